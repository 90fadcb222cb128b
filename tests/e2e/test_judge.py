"""transformers' own behaviour as judge. At full budget every way to generate gives the unmodified model's tokens; at a
quarter what `generate` gives on the unmodified model whose attention is masked to what a naive cache kept, for beams,
samples, guidance and prompts in chunks alike, and drafts change nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import smollm2
import torch
from models import tiny, zoo
from oracle.chat import gentle
from oracle.coded import CodedSimulator, Held
from oracle.drive import compare_logits, kept_positions
from oracle.judge import AnyJudge, Judge, judge_of
from oracle.simulator import Simulator
from spelling import cache_of
from torch import Tensor

import kvpass
from kvpass.errors import CacheError

QUARTER, FLOOR = 0.25, 36
NEW = 16


@functools.cache
def model_of(family: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: tiny.one_llama(layers=1),
        "gpt2": lambda: tiny.gpt2("eager"),
        "gemma3": zoo.gemma3,
        "bart": zoo.bart,
        "gentle": lambda: gentle(layers=1),
    }
    return makers[family]()


WIDE = pytest.mark.wide
FAMILIES = ("llama", "gpt2", "gemma3", "bart")
"""Grouped heads and RoPE; positions that are learned, attention written out; windows; an encoder."""

ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "temperature": 1.5, "seed": 7},
    "assisted": {"assistant_model": True},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(autouse=True)
def drafting() -> Iterator[None]:
    """How transformers calls an assistant it calls deprecated."""
    yield
    for handler in logging.getLogger("transformers").handlers:
        getattr(handler, "said", []).clear()  # of conftest.py


def prompt(length: int = 14) -> Tensor:
    """A text that repeats itself, so that looking it up drafts tokens."""
    return torch.cat([tiny.tokens(1, length)] * 4, 1)


def generated(model: Any, ids: Tensor, seed: int = 5, **asked: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **asked}
    mask = {} if model.config.is_encoder_decoder else {"attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **mask, **settings)


def asked_of(name: str, model: Any) -> dict[str, Any]:
    asked = ASKED[name]
    return {**asked, "assistant_model": model} if "assistant_model" in asked else asked


@pytest.mark.wide  # SmolLM2, below
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_budget_is_the_models_own(family: str) -> None:
    model = model_of(family)
    compiled = kvpass.compile(model, "full", inner="eager")
    for name in ASKED:
        ours, theirs = (generated(one, prompt(), **asked_of(name, model)) for one in (compiled, model))
        assert torch.equal(ours.sequences, theirs.sequences), name


def quarter(policy: str, **fields: Any) -> dict[str, Any]:
    return {"name": "mine", "extends": policy, "min_slots": FLOOR, **fields}


def same_as_judged(ours: Any, theirs: Any, judge: Judge, evicting: set[int]) -> None:
    """Tokens, logits and scores of each step, which beams were picked, and what every head kept."""
    for name in ("logits", "scores"):
        for got, want in zip(ours[name], theirs[name], strict=True):
            finite = want.isfinite()
            compare_logits(got[finite], want[finite])
    assert torch.equal(ours.sequences, theirs.sequences)
    if "beam_indices" in theirs:
        assert torch.equal(ours.beam_indices, theirs.beam_indices)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-3, atol=1e-3)
    simulator = judge.of(cache_of(theirs))
    for layer, positions in zip(sorted(evicting), kept_positions(cache_of(ours)), strict=True):
        kept = [[sorted(head) for head in row] for row in simulator.kept(layer)]
        assert kept == [[sorted(at for at in head if at >= 0) for head in row] for row in positions.tolist()]


DETAILS = {"output_logits": True, "output_scores": True, "max_new_tokens": 8}
HELD = Held("int4", "int4", True, 64, 8, 3)
POLICIES: dict[str, tuple[dict[str, Any], Any]] = {
    "h2o": (quarter("h2o"), Simulator),
    "ragged": (quarter("ada_snapkv"), Simulator),
    "codes": (quarter("h2o", store=HELD.spec), functools.partial(CodedSimulator, rounding=2.0**-9, held=HELD)),
}


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "asked",
    [
        {"prefill_chunk_size": 80},
        {"guidance_scale": 1.7, "negative_prompt_ids": tiny.tokens(1, 160, seed=8)},
        pytest.param({"num_beams": 3}, marks=WIDE),  # test_beams.py
        pytest.param({"do_sample": True, "num_return_sequences": 3, "temperature": 1.5}, marks=WIDE),
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_quarter_is_the_oracles(policy: str, asked: dict[str, Any]) -> None:
    """Guidance reads the second prompt through a cache of its own."""
    model, (spec, simulator) = model_of("gentle"), POLICIES[policy]
    judge = judge_of(model, spec["extends"], QUARTER, FLOOR, simulator)
    compiled = kvpass.compile(model, spec, QUARTER, inner="eager")
    outs = [generated(one, tiny.tokens(1, 160), **DETAILS, **asked) for one in (compiled, judge)]
    same_as_judged(*outs, judge, {0})


@pytest.mark.wide
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("family", "evicting"), [("gpt2", {0, 1}), ("gemma3", {1}), ("bart", {0})], ids=str)
def test_beams_of_other_models(family: str, evicting: set[int]) -> None:
    """Layers with windows, and attention to an encoder, stay as they are."""
    model = model_of(family)
    judge = AnyJudge(model, lambda: Simulator("h2o", QUARTER, FLOOR), evicting)
    compiled = kvpass.compile(model, quarter("h2o"), QUARTER, inner="eager")
    asked = {**DETAILS, "num_beams": 3, "max_new_tokens": 60 if family == "bart" else 8}
    outs = [generated(one, tiny.tokens(2, 90), **asked) for one in (compiled, judge)]
    same_as_judged(*outs, judge, evicting)


WINDOW = {"observe": {"queries": 8}, "protect": {"recent": 8}}
DRAFTED = {
    "even": quarter("h2o", min_slots=12),
    "ragged": quarter("ada_snapkv", min_slots=12, **WINDOW),
    "codes": quarter("h2o", min_slots=12, store={"k": "int4", "v": "int4", "residual": 4, "sinks": 2}),
}


@pytest.mark.wide  # SmolLM2, below; test_speculative.py
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", DRAFTED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_drafts_change_nothing_at_a_quarter(family: str, policy: str) -> None:
    compiled = kvpass.compile(model_of(family), DRAFTED[policy], QUARTER, inner="eager")
    want = generated(compiled, prompt())
    for name in ("assisted", "lookup"):
        got = generated(compiled, prompt(), **asked_of(name, model_of(family)))
        assert torch.equal(got.sequences, want.sequences), name


@pytest.mark.parametrize(("family", "what"), [("gemma3", "sliding-window"), ("bart", "encoder-decoder")])
def test_drafts_that_are_refused(family: str, what: str) -> None:
    compiled = kvpass.compile(model_of(family), quarter("h2o"), QUARTER, inner="eager")
    for name in ("assisted", "lookup"):
        with pytest.raises(CacheError, match=what):
            generated(compiled, prompt(), **asked_of(name, model_of(family)))


@pytest.fixture(scope="module", params=[1, pytest.param(None, marks=WIDE)], ids=["1 layer", "all layers"])
def real(request: Any) -> Any:
    """SmolLM2, and 200 tokens of English."""
    model, tokenizer = smollm2.load(layers=request.param)
    return model, tokenizer(smollm2.text(3000, start=20_000), return_tensors="pt").input_ids[:, :200]


@pytest.mark.model
@pytest.mark.usefixtures("one_trace")
def test_smollm2_at_full_budget(real: Any) -> None:
    model, ids = real
    full = kvpass.compile(model, "full", inner="eager")
    for name in ASKED:
        ours, theirs = (generated(one, ids, **asked_of(name, model), eos_token_id=None) for one in (full, model))
        assert torch.equal(ours.sequences, theirs.sequences), name


@pytest.mark.model
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", [pytest.param("h2o", marks=WIDE), "ragged", pytest.param("codes", marks=WIDE)])
def test_smollm2_at_a_quarter(real: Any, policy: str) -> None:
    """Drafts change nothing; beams are the oracle's."""
    (model, ids), (spec, simulator) = real, POLICIES[policy]
    small = kvpass.compile(model, spec, QUARTER, inner="eager")
    plain = generated(small, ids, eos_token_id=None)
    for name in ("assisted", "lookup"):
        got = generated(small, ids, **asked_of(name, model), eos_token_id=None)
        assert torch.equal(got.sequences, plain.sequences), name
    if policy != "codes":
        judge = judge_of(model, spec["extends"], QUARTER, FLOOR, simulator)
        asked = {**DETAILS, "num_beams": 3, "eos_token_id": None}
        outs = [generated(one, ids, **asked) for one in (small, judge)]
        same_as_judged(*outs, judge, set(range(model.config.num_hidden_layers)))
