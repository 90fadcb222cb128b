"""HF StaticCache: preallocated in the graph, written by index_copy_. kvpass holds the live slots only."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import tiny
from spelling import cache_of, with_cache
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

import kvpass

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}

COUNTS = "cumulative_length" in inspect.getsource(StaticLayer)
"""Whether a static cache knows how many tokens it holds. Older ones look for keys that are not zero, unless they are
told (as `generate` does) where tokens stand: docs/sharp-edges.md."""


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **GREEDY, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_budget_is_the_model(attention: str) -> None:
    model = tiny.llama()
    model.set_attn_implementation(attention)
    ids, mask = tiny.left_padded([60, 41])
    expected = generate(model, ids, mask, cache_implementation="static")
    found = generate(
        kvpass.compile(model, "full", inner="eager", verify=True), ids, mask, cache_implementation="static"
    )
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_evicts_like_a_growing_cache_and_holds_less(inner: str) -> None:
    model = tiny.llama(6, 2)
    ids, mask = tiny.left_padded([90, 70])
    static = generate(kvpass.compile(model, "h2o", 24, inner=inner), ids, mask, cache_implementation="static")
    growing = generate(kvpass.compile(model, "h2o", 24, inner="eager"), ids, mask)
    assert torch.equal(static.sequences, growing.sequences)
    ours, theirs = (kvpass.inspect(cache_of(out)).layers for out in (static, growing))
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(ours, theirs, strict=True))
    report = kvpass.report(cache_of(static)).to_dict()
    shells = [t for layer in cache_of(static).layers for t in (layer.keys, layer.values)]
    assert all(t.untyped_storage().nbytes() == 4 * (sum(t.shape) - t.dim() + 1) for t in shells)  # no product of sizes
    # where transformers keeps the cache at the model, this resets and fills the same one
    dense = cache_of(generate(model, ids, mask, cache_implementation="static"))
    held = sum(t.untyped_storage().nbytes() for layer in dense.layers for t in (layer.keys, layer.values))
    assert report["dense_bytes"] == held
    assert report["bytes"] <= 0.3 * held


@pytest.mark.usefixtures("in_torch")
def test_a_reset_cache_begins_anew() -> None:
    model = tiny.llama(6, 2)
    compiled = kvpass.compile(model, "h2o", 24, inner="eager")
    cache, fresh = (StaticCache(config=model.config, max_cache_len=80) for _ in range(2))
    ids = tiny.tokens(2, 60, seed=3)
    call(compiled, tiny.tokens(2, 60), cache)
    call(compiled, tiny.tokens(2, 1), cache)
    cache.reset()
    assert torch.equal(call(compiled, ids, cache, at=0), call(compiled, ids, fresh))
    assert torch.equal(call(compiled, ids[:, :1], cache), call(compiled, ids[:, :1], fresh))
    cache.reset()  # and is the unmodified model's, too
    other = StaticCache(config=model.config, max_cache_len=80)
    torch.testing.assert_close(call(model, ids, cache, at=0), call(model, ids, other))


def call(model: Any, ids: torch.Tensor, cache: Any, at: int | None = None) -> torch.Tensor:
    """Logits of the last token; `at`: where the call's tokens stand, if not behind those of the calls before."""
    start, told = getattr(cache, "told", 0) if at is None else at, {}
    if COUNTS and at is not None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(at)
    elif not COUNTS:
        cache.told = start + ids.shape[1]
        told = {"cache_position": torch.arange(start, cache.told)}
    with torch.no_grad():
        return model(ids, **with_cache(model, cache), **told, use_cache=True).logits[:, -1]


def test_several_turns() -> None:
    """Prompt, decode, many tokens at once, decode: as one growing cache would have it."""
    model = tiny.llama(6, 2)
    compiled = kvpass.compile(model, "full", inner="eager")
    caches = StaticCache(config=model.config, max_cache_len=80), StaticCache(config=model.config, max_cache_len=80)
    for length, seed in ((20, 1), (1, 2), (1, 3), (9, 4), (1, 5)):
        ids = tiny.tokens(2, length, seed=seed)
        torch.testing.assert_close(call(compiled, ids, caches[0]), call(model, ids, caches[1]), rtol=1e-4, atol=1e-4)


def test_a_cache_filled_by_others_is_refused() -> None:
    model = tiny.llama()
    cache = StaticCache(config=model.config, max_cache_len=40)
    call(model, tiny.tokens(1, 10), cache)
    with pytest.raises(kvpass.KVPassError, match="did not make"):
        call(kvpass.compile(model, "h2o", 8, inner="eager"), tiny.tokens(1, 1), cache)


def test_a_rewound_cache_is_refused() -> None:
    model = tiny.llama()
    compiled = kvpass.compile(model, "h2o", 8, inner="eager")
    cache = StaticCache(config=model.config, max_cache_len=40)
    call(compiled, tiny.tokens(1, 10), cache)
    call(compiled, tiny.tokens(1, 1), cache)
    with pytest.raises(kvpass.KVPassError, match="written at 5, but the cache has seen 11"):
        call(compiled, tiny.tokens(1, 1), cache, at=5)
