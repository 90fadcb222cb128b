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
from models.turns import GREEDY, beams
from oracle.chat import CodedChat, gentle
from oracle.coded import CodedSimulator, Held
from oracle.hf import Oracle
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache

import kvpass
from kvpass.policy.policy import Policy
from kvpass.runtime.shell import find

PRESETS = {"kivi": None, "think": 48, "vidkv": None, "csr": None}
STORES = {
    "balance": Held("int8", "int8", True, 64, 8, 3, "balance"),
    "range": Held("int4", "int4", False, 8, 8, 0, "range", "range"),
    "channels": Held("float16", "dense", False, 64, 8, 0, "channels"),
    "spread": Held("mixed_2_1", "ternary", False, 8, 8, 0, "spread", "range"),
}


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
@pytest.mark.some(3)
def test_a_conversation(policy: str, store: str) -> None:
    """A padded prompt, tokens, a second turn of unequal rows, tokens: slots and logits are the simulation's."""
    held, budget = STORES[store], {"full": 1.0, "h2o": 40, "ada_snapkv": 48}[policy]
    compiled = kvpass.compile(gentle(), stored(policy, held), None if policy == "full" else budget, inner="eager")
    simulator = CodedSimulator(policy, budget, 40, 2.0**-9, held=held)
    chat = CodedChat(compiled, Oracle(gentle(), policy, budget, 40), simulator)
    chat.converse((10, 4))
    chat.check()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.some(2)
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
                torch.testing.assert_close(other[row], theirs[fit][0], rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.some(2)
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
@pytest.mark.some(1)
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
    store = {"k": "int8", "v": "int8", "residual": 6, "fit_k": "range", "fit_v": "range", "rotate": "none"}
    compiled = kvpass.compile(gentle(), {"store": store}, inner="eager")
    assert torch.equal(beams(compiled, 8), beams(gentle(), 8))


@pytest.mark.wide  # test_coded_generate.py has the like of it in CI
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
