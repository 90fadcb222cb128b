"""What generate does with a cache's rows: beams, samples, several sequences of one prompt, guidance."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import tiny
from oracle.beams import searched
from oracle.drive import compare_logits, kept_positions
from oracle.hf import Oracle
from spelling import cache_of

import kvpass

ASKED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "the best beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples of one prompt": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
    "guidance": {"guidance_scale": 1.7, "rows": 1, "new": 3},
    "static": {"num_beams": 3, "cache_implementation": "static", "new": 3},
}


@functools.cache
def model_of(family: str) -> Any:
    return tiny.one_llama() if family == "llama" else tiny.gpt2("sdpa")


def generated(model: Any, rows: int = 2, new: int = 6, lengths: tuple[int, ...] = (70, 45), **asked: Any) -> Any:
    ids, mask = tiny.left_padded(list(lengths[:rows]))
    torch.manual_seed(5)
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(ids, attention_mask=mask, **{**settings, **asked})


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("family", "policy", "name"), [*(("llama", "ada_snapkv", name) for name in ASKED), ("gpt2", "h2o", "beams")]
)
@pytest.mark.some(3)
def test_a_full_budget_is_the_models_own(family: str, policy: str, name: str) -> None:
    model = model_of(family)
    compiled = kvpass.compile(model, policy, 1.0, inner="eager")
    ours, theirs = (generated(one, **ASKED[name]) for one in (compiled, model))
    assert torch.equal(ours.sequences, theirs.sequences)
    if ASKED[name].get("num_beams"):
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["h2o", "ada_snapkv", "streaming_llm"])
def test_beams_at_a_quarter_are_the_oracles(policy: str) -> None:
    """Each step's logits, the beams' scores, the sequences and what each beam kept."""
    model, floor = tiny.one_llama(), 36
    compiled = kvpass.compile(model, {"name": "mine", "extends": policy, "min_slots": floor}, 0.25, inner="eager")
    asked = {"num_beams": 3, "output_logits": True, "lengths": (170, 150)}
    ours = generated(compiled, **asked)
    oracle = Oracle(model, policy, 0.25, floor)
    ids, mask = tiny.left_padded([170, 150])
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    theirs = searched(oracle, ids, mask, num_beams=3, output_logits=True, **settings)
    for got, want in zip(ours.logits, theirs.logits, strict=True):
        compare_logits(got, want)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-3, atol=1e-3)
    for layer, positions in enumerate(kept_positions(cache_of(ours))):
        kept = oracle.simulator.kept(layer)
        assert [[sorted(head) for head in row] for row in kept] == [
            [[at for at in head if at >= 0] for head in row] for row in positions.tolist()
        ]
    assert ours.sequences.tolist() != generated(model, **asked).sequences.tolist()  # a quarter is another search


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["h2o", "ada_snapkv", "layer_defensivekv", "coded", "tiers", "kivi"])
def test_whatever_slots_hold(policy: str) -> None:
    """No search is refused, and rows stay within their budget."""
    spec: Any = {
        "coded": {"name": "mine", "extends": "ada_snapkv", "store": "int4"},
        "tiers": {"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}},
    }.get(policy, policy)
    compiled = kvpass.compile(tiny.one_llama(), spec, None if policy == "kivi" else 40, inner="eager")
    cache = kvpass.Cache(generated(compiled, new=4, **ASKED["beams that sample"]))
    assert (cache.rows, cache.tokens) == (6, 70 + 3)
    if policy in ("h2o", "ada_snapkv", "coded"):
        assert int((next(iter(cache)).positions >= 0).sum()) <= 6 * 2 * 40
