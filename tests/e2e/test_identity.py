"""With a full budget the rewritten model is the model: greedy tokens are the same, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import smollm2
import torch
from models import tiny

import kvpass

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
FULL = [("full", None), ("h2o", 1.0), ("snapkv", 1.0)]


@pytest.fixture(scope="module", params=[4, pytest.param(None, marks=pytest.mark.wide)], ids=["4 layers", "all layers"])
def real(request: Any) -> Any:
    """With some layers: a third of the time to trace and compile, and the same code."""
    return smollm2.load(layers=request.param)


@pytest.fixture(scope="module")
def prompt(real: Any) -> torch.Tensor:
    return real[1](smollm2.text(6000), return_tensors="pt").input_ids[:, :1000]


@pytest.fixture(scope="module")
def expected(real: Any, prompt: torch.Tensor) -> torch.Tensor:
    return real[0].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **GREEDY)


def same_tokens(got: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = (got != expected).nonzero().tolist()
    assert not wrong, f"tokens differ, first at (row, position) {wrong[0]}"


@pytest.mark.model
@pytest.mark.wide  # the same prompt through Inductor and a padded batch run eagerly, below
@pytest.mark.parametrize("policy", FULL)
def test_smollm2_eager(policy: Any, real: Any, prompt: torch.Tensor, expected: torch.Tensor) -> None:
    model = kvpass.compile(real[0], policy[0], policy[1], inner="eager")
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **GREEDY)
    same_tokens(got, expected)


@pytest.mark.model
def test_smollm2_inductor(real: Any, prompt: torch.Tensor, expected: torch.Tensor) -> None:
    """The h2o rule in Inductor's graphs; a frozen SymInt would make the text go wrong after a few tokens."""
    model = kvpass.compile(real[0], "h2o", 1.0, inner="inductor")
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, **GREEDY)
    same_tokens(got, expected)


@pytest.mark.model
def test_smollm2_left_padded_batch(real: Any) -> None:
    model, tokenizer = real
    whole = tokenizer(smollm2.text(3000), return_tensors="pt").input_ids[0]
    lengths = [300, 211, 120, 7]
    ids = torch.full((4, 300), tokenizer.eos_token_id)
    mask = torch.zeros(4, 300, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 300 - n :], mask[row, 300 - n :] = whole[row * 50 : row * 50 + n], 1
    compiled = kvpass.compile(model, "full", inner="eager")
    same_tokens(*(m.generate(ids, attention_mask=mask, max_new_tokens=24, **GREEDY) for m in (compiled, model)))


@pytest.mark.parametrize(
    ("policy", "inner"),
    [
        (FULL[1], "inductor"),
        *(
            pytest.param(p, inner, marks=pytest.mark.wide)
            for p in FULL
            for inner in ("aot_eager", "inductor")
            if (p, inner) != (FULL[1], "inductor")
        ),
    ],
)
@pytest.mark.wide  # the same prompt through Inductor, and padded batches run eagerly, are in CI
def test_tiny_left_padded_batch(policy: Any, inner: str) -> None:
    padded_batch(tiny.llama(6, 2), policy, inner)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", FULL)
def test_tiny_left_padded_batch_eager(policy: Any) -> None:
    padded_batch(tiny.one_llama(6, 2), policy, "eager")


def padded_batch(model: Any, policy: Any, inner: str) -> None:
    compiled = kvpass.compile(model, policy[0], policy[1], inner=inner)
    ids, mask = tiny.left_padded([50, 31, 8, 49])
    same_tokens(*(m.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY) for m in (compiled, model)))


def test_parameters_are_shared_and_the_original_is_left_alone() -> None:
    model = tiny.llama()
    ids = tiny.tokens(1, 20)
    before = model(ids).logits
    compiled = kvpass.compile(model, "h2o", 16, inner="eager")
    assert compiled.__class__ is type(model)
    assert all(a is b for a, b in zip(compiled.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        compiled.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model(ids).logits, before)
