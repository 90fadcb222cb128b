"""Models whose codes hang on fits of heads: logits are the oracle's, rows do not know each other, and fits go along
with whatever a cache goes through.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kvpass.kernels.codecs.storage import fit_fields
from models import tiny
from oracle.coded import CodedSimulator, Held
from oracle.drive import kept_positions
from oracle.hf import Oracle
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache

import kvpass
from kvpass.policy.policy import Policy
from kvpass.runtime.shell import find

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
PRESETS = {"kivi": None, "think": 48, "vidkv": None, "csr": None}
CLOSE, FLIPPED = 2.0**-12, 2e-2
"""Differences of logits, relative to the largest: what rounding makes of them; and where float32 and float64 see an
entry on two sides of the middle between two codes.
"""
STORES = {
    "balance": Held("int8", "int8", True, 64, 8, 3, "balance"),
    "range": Held("int4", "int4", False, 8, 8, 0, "range", "range"),
    "channels": Held("float16", "dense", False, 64, 8, 0, "channels"),
    "spread": Held("mixed_2_1", "ternary", False, 8, 8, 0, "spread", "range"),
}


def gentle() -> Any:
    """A tiny model whose attention is not so sharp that the least bit of a code decides."""
    model = tiny.llama(4, 2, 16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 0.15
    return model


def stored(policy: str, held: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "mine", "extends": policy, "store": held.spec, "min_slots": 40, **fields}


def fits_of(cache: Any) -> list[dict[str, Tensor]]:
    """Of each layer, by name."""
    stores: list[Any] = [find(layer.keys) for layer in cache.layers]
    return [{name: store.state[name] for name in fit_fields(store.rule)} for store in stores]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("policy", "store"),
    [("full", "range"), ("h2o", "spread"), ("h2o", "balance"), ("ada_snapkv", "channels"), ("ada_snapkv", "range")],
)
def test_a_conversation(policy: str, store: str) -> None:
    """A padded prompt, tokens, a second turn of unequal rows, tokens: slots and logits are the simulation's."""
    model, held, budget = gentle(), STORES[store], {"full": 1.0, "h2o": 40, "ada_snapkv": 48}[policy]
    compiled = kvpass.compile(model, stored(policy, held), None if policy == "full" else budget, inner="eager")
    oracle = Oracle(model, policy, budget, 40)
    simulator = CodedSimulator(policy, budget, 40, 2.0**-9, held=held)
    simulator.depth, simulator.outward = oracle.simulator.depth, oracle.simulator.outward
    oracle.simulator = simulator
    cache, gaps = DynamicCache(config=model.config), []
    ids, mask = tiny.left_padded([60, 45])
    later, shown = tiny.left_padded([9, 4], seed=2)
    for step in range(16):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            out = compiled(ids, **with_cache(compiled, cache), use_cache=True, logits_to_keep=1, **extra)
        want = oracle(ids, **extra)
        simulator.follow(kept_positions(cache))
        gaps.append(float((out.logits[:, -1] - want).abs().max() / want.abs().max()))
        ids, new = want.argmax(-1, keepdim=True), torch.ones(2, 1, dtype=mask.dtype)
        if step == 10:
            ids, new = torch.cat([ids, later], 1), torch.cat([new, shown], 1)
        mask = torch.cat([mask, new], 1)
    assert simulator.near_ties <= 0.02 * simulator.compared
    assert sum(gap > CLOSE for gap in gaps) <= 0.1 * len(gaps)
    assert max(gaps) <= FLIPPED


@pytest.mark.parametrize("name", PRESETS)
def test_presets_generate(name: str) -> None:
    """A padded batch, each row as alone; what is held is less than what the model would hold."""
    model, lengths = gentle(), [190, 160]
    compiled = kvpass.compile(model, name, PRESETS[name], inner="eager")
    ids, mask = tiny.left_padded(lengths)
    out = compiled.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    data = kvpass.report(cache_of(out)).to_dict()
    assert data["coded"]
    assert data["slot_bytes"] < data["dense_bytes"] or name == "csr"  # dictionaries are more than so few tokens
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, -length:]
        alone = compiled.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=6, **GREEDY)
        assert torch.equal(alone.sequences[0, -6:], out.sequences[row, -6:])
        for ours, theirs in zip(fits_of(cache_of(out)), fits_of(cache_of(alone)), strict=True):
            assert [*ours] == [*theirs] != []
            for fit, other in ours.items():
                torch.testing.assert_close(other[row], theirs[fit][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_later_calls_and_copies_have_the_first_fit(name: str) -> None:
    """Chunks, turns, growth, a deep copy that goes its own way."""
    model = gentle()
    compiled = kvpass.compile(model, name, PRESETS[name], inner="eager")
    cache = DynamicCache(config=model.config)

    def call(given: Any, length: int, seed: int) -> Tensor:
        with torch.no_grad():
            ids = tiny.tokens(2, length, seed=seed)
            return compiled(ids, **with_cache(compiled, given), use_cache=True).logits

    call(cache, 60, 0)
    before = [{fit: x.clone() for fit, x in fits.items()} for fits in fits_of(cache)]
    for seed, length in enumerate((30, *[1] * 40, 9, 1)):
        call(cache, length, seed)
    twin = copy.deepcopy(cache)
    assert torch.equal(call(twin, 1, 3), call(cache, 1, 3))
    call(twin, 20, 5)
    for one in (cache, twin):
        for fits, first in zip(fits_of(one), before, strict=True):
            assert all(torch.equal(fits[fit], x) for fit, x in first.items())


@pytest.mark.parametrize("name", ["think", "vidkv"])
def test_static_caches_are_fitted_too(name: str) -> None:
    """Whose prompts come as calls behind an empty past."""
    ids, mask = tiny.left_padded([80, 66])
    outs = [
        kvpass.compile(gentle(), name, PRESETS[name], inner="eager").generate(
            ids, attention_mask=mask, max_new_tokens=8, **GREEDY, **extra
        )
        for extra in ({"cache_implementation": "static"}, {})
    ]
    assert torch.equal(*[out.sequences for out in outs])
    static, grown = (kvpass.inspect(cache_of(out)).layers for out in outs)
    for ours, theirs in zip(static, grown, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_beams_take_their_fits_along() -> None:
    ids, mask = tiny.left_padded([70, 45])
    store = {"k": "int8", "v": "int8", "residual": 6, "fit_k": "range", "fit_v": "range", "rotate": "none"}
    compiled = kvpass.compile(gentle(), {"store": store}, inner="eager")
    ours, want = (
        model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, **GREEDY)
        for model in (compiled, gentle())
    )
    assert torch.equal(ours.sequences, want.sequences)


def test_inductor_changes_nothing() -> None:
    model, (ids, mask) = tiny.llama(layers=1), tiny.left_padded([70, 45])
    outs = [
        kvpass.compile(model, "vidkv", inner=inner).generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
        for inner in ("eager", "inductor")
    ]
    assert torch.equal(*[out.sequences for out in outs])
    for ours, theirs in zip(*[fits_of(cache_of(out)) for out in outs], strict=True):
        for fit, x in ours.items():
            torch.testing.assert_close(x, theirs[fit], rtol=1e-4, atol=1e-4)


def test_bytes() -> None:
    """A budget in bytes holds with fits counted."""
    held = {**Policy.load("vidkv").to_dict()["store"], "residual": 8}
    policy = {"name": "mine", "extends": "h2o", "min_slots": 8, "store": held}
    model = gentle()
    compiled = kvpass.compile(model, policy, "50% bytes", inner="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for length in (300, *[1] * 20):
            compiled(tiny.tokens(2, length), **with_cache(compiled, cache), use_cache=True)
    data = kvpass.report(cache).to_dict()
    ours = data["slot_bytes"] + data["overhead_bytes"]
    assert data["proof"]["evicted"] > 0 or ours < 0.5 * data["dense_bytes"]
    assert ours <= 1.03 * 0.5 * data["dense_bytes"]
