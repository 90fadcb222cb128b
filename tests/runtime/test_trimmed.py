"""Rows picked without what only others needed: columns of padding, and slots. And what caches hold at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.kinds import KINDS
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvpass
from kvpass.errors import CacheError

pytestmark = pytest.mark.usefixtures("one_trace")

MORE: dict[str, tuple[Any, Any]] = {
    "calls alone evict": ({"name": "mine", "extends": "h2o", "when": "calls"}, 24),
    "once": ({"name": "mine", "extends": "h2o", "when": "first"}, 24),
    "turned keys": ("streaming_llm_reindexed", 24),
    "later": ({"name": "mine", "extends": "h2o", "every": 4}, 24),
}


def compiled(kind: str) -> Any:
    policy, budget = {**KINDS, **MORE}[kind]
    return kvpass.compile(tiny.one_llama(), policy, budget, inner="eager")


def fed(model: Any, cache: kvpass.Cache, ids: Tensor) -> Tensor:
    """Logits of a call behind what the cache holds, of rows whose padding stands in front."""
    mask = torch.ones(ids.shape[0], ids.shape[1], dtype=torch.long)
    if cache.tokens:
        mask = torch.cat([cache.mask(), mask], 1)
    positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
    with torch.no_grad():
        given = {**with_cache(model, cache), "attention_mask": mask, "position_ids": positions}
        logits: Tensor = model(ids, use_cache=True, **given).logits
    return logits


def begun(model: Any, length: int, seed: int) -> kvpass.Cache:
    cache = kvpass.Cache(DynamicCache(config=tiny.one_llama().config))
    fed(model, cache, tiny.tokens(1, length, seed))
    fed(model, cache, tiny.tokens(1, 1, seed))
    return cache


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.wide) for kind in MORE)])
@pytest.mark.some(4)
def test_rows_that_are_left(kind: str) -> None:
    """A short row of a batch whose longer one has left goes on as if it had been alone; and bounds hold."""
    model = compiled(kind)
    if kind != "later":  # steps that wait are counted by the batch
        goes_on_as_alone(model)
    bounds_hold_and_are_near(model, near=kind != "layers")


def goes_on_as_alone(model: Any) -> None:
    """As long, in as many bytes, and with the same positions."""
    alone, long, ids = begun(model, 45, 1), begun(model, 90, 2), tiny.tokens(2, 12, 3)
    batch = kvpass.Cache.merge([long, alone])
    for at in range(4):
        fed(model, batch, ids[:, at : at + 1])
        fed(model, alone, ids[1:, at : at + 1])
    left = batch.select([1], trim=True)
    assert (batch.rows, batch.tokens, batch.padding.tolist()) == (2, 95, [0, 45])
    assert (left.rows, left.tokens, left.padding.tolist()) == (1, 50, [0])
    assert kvpass.Cache.held([left], overhead=True) <= left.bounds().held([45], 12)
    for at in range(4, 7):
        got, want = (fed(model, cache, ids[1:, at : at + 1]) for cache in (left, alone))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    got, want = (fed(model, cache, ids[1:, 7:]) for cache in (left, alone))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for mine, own in zip(left, alone, strict=True):
        assert torch.equal(mine.positions, own.positions)
    assert left.bytes <= 1.05 * alone.bytes
    assert torch.equal(left.mask(), torch.ones(1, 58, dtype=torch.long))


def bounds_hold_and_are_near(model: Any, near: bool) -> None:
    """Prompts, a prompt in two calls, steps and batches: no cache holds more than was said before, nor half of it."""
    bounds = begun(model, 20, 1).bounds()
    for calls in ([70], [40, 30]):
        cache, most = kvpass.Cache(DynamicCache(config=tiny.one_llama().config)), 0
        for at, new in enumerate([*calls, *[1] * 12]):
            fed(model, cache, tiny.tokens(1, new, at))
            held = kvpass.Cache.held([cache], overhead=True)
            most = max(most, held)
            assert held <= bounds.peak(calls), f"in call {at}"
            assert at < len(calls) - 1 or held <= bounds.held(calls, max(0, at + 1 - len(calls)))
        batch = kvpass.Cache.merge([begun(model, 30, 5), cache])
        assert kvpass.Cache.held([batch], overhead=True) <= bounds.held(calls, 12, rows=2)
        assert not near or most > 0.5 * bounds.held(calls, 12)
    assert bounds.held([70], 12) < bounds.peak([70], 12)


def test_what_is_not_trimmed_or_bounded() -> None:
    """Columns that some row needs stay; so do those of hosts that may count by themselves."""
    model = compiled("even")
    with pytest.raises(CacheError, match="no token yet"):
        kvpass.Cache(DynamicCache(config=tiny.one_llama().config)).bounds()
    batch = kvpass.Cache.merge([begun(model, 30, 1), begun(model, 60, 2), begun(model, 50, 3)])
    assert batch.select([0, 2], trim=True).padding.tolist() == [20, 0]
    assert batch.select([1, 2], trim=True).padding.tolist() == [0, 10]
    assert batch.select([0]).tokens == batch.tokens == 61
    host = StaticCache(config=tiny.one_llama().config, max_cache_len=90)
    with torch.no_grad():
        model(tiny.tokens(2, 60), **with_cache(model, host), use_cache=True)
    with pytest.raises(CacheError, match="preallocated"):
        kvpass.Cache(host).select([0], trim=True)

    class Mine:
        def __init__(self, host: Any) -> None:
            self.layers = host.layers

    with pytest.raises(CacheError, match="a Mine may count"):
        kvpass.Cache(Mine(batch.host)).select([0], trim=True)
