"""kvpass.Cache: one object for whatever a host holds; forks, rows, merged batches."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.kinds import KINDS
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvpass
from kvpass.errors import CacheError, StaleCacheError
from kvpass.runtime.shell import find

pytestmark = pytest.mark.usefixtures("one_trace")


def compiled(kind: str = "even") -> Any:
    policy, budget = KINDS[kind]
    return kvpass.compile(tiny.one_llama(), policy, budget, inner="eager")


def fed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a call; the mask is the whole sequence's, and position ids are what generate makes of it."""
    more = {}
    if mask is not None:
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    with torch.no_grad():
        logits: Tensor = model(ids, **with_cache(model, cache), use_cache=True, **more).logits
    return logits


def pickled(cache: kvpass.Cache) -> kvpass.Cache:
    return pickle.loads(pickle.dumps(cache))


def begun(model: Any, length: int, rows: int = 1, seed: int = 0, steps: int = 1) -> kvpass.Cache:
    cache = kvpass.Cache(DynamicCache(config=tiny.one_llama().config))
    fed(model, cache, tiny.tokens(rows, length, seed))
    for at in range(steps):
        fed(model, cache, tiny.tokens(rows, 1, seed + at))
    return cache


def gone_on(model: Any, cache: kvpass.Cache, ids: Tensor, masked: bool = False) -> Tensor:
    """Logits of a step for each column but the last five, which come in one call."""
    said, mask = [], cache.mask() if masked else None
    for part in (*ids[:, :-5].split(1, 1), ids[:, -5:]):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(part)], 1)
        said.append(fed(model, cache, part, mask))
    return torch.cat(said, 1)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_it_is_the_hosts_own() -> None:
    model = compiled()
    host = DynamicCache(config=tiny.one_llama().config)
    cache = kvpass.Cache(host)
    assert "empty" in repr(cache)
    assert (cache.tokens, cache.rows, cache.bytes, len(cache), list(cache)) == (0, 0, 0, 0, [])
    fed(model, cache, tiny.tokens(2, 50))
    fed(model, host, tiny.tokens(2, 1))
    assert cache.host is host
    assert kvpass.Cache(cache).host is host
    assert (cache.tokens, cache.rows, len(cache)) == (51, 2, 2)
    assert cache.bytes == kvpass.report(host).to_dict()["bytes"] == kvpass.report(cache).to_dict()["bytes"]
    for mine, its in zip(cache, kvpass.inspect(host).layers, strict=True):
        assert mine.name == its.name
        assert torch.equal(mine.keys, its.keys)
    assert "h2o 24: 2 rows, 51 tokens, 2 layers of at most 24 slots" in repr(cache)
    for wrong in (None, model, 3, "cache"):
        with pytest.raises(CacheError, match="is no cache"):
            kvpass.Cache(wrong)


def test_every_door_takes_one() -> None:
    """Calls, `forward`, generate; tuples, lists and a model's output."""
    model = plain.one(plain.Decoder)
    own = kvpass.compile(model, "h2o", 24, inner="eager")
    with torch.no_grad():
        out = own(plain.tokens(1, 40), None)
        for given in (out, out[1], list(out[1])):
            cache = kvpass.Cache(copy.deepcopy(given))
            assert (cache.tokens, len(cache)) == (40, 2)
            assert kvpass.Cache(own(plain.tokens(1, 1), cache)).tokens == 41
            assert kvpass.Cache(own.forward(plain.tokens(1, 1), kvpass.Cache(copy.deepcopy(given)))).tokens == 41
    hf, ids = compiled(), tiny.tokens(1, 60)
    cache, asked = begun(hf, 60, steps=0), {"max_new_tokens": 3, "return_dict_in_generate": True, "do_sample": False}
    more = torch.cat([ids, tiny.tokens(1, 4)], 1)
    ours = hf.generate(more, attention_mask=torch.ones_like(more), **with_cache(hf, cache.fork()), **asked)
    theirs = hf.generate(more, attention_mask=torch.ones_like(more), **with_cache(hf, cache.host), **asked)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert kvpass.Cache(cache_of(ours)).tokens == cache.tokens == 66


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(4)
def test_forks_hold_their_slots_once(kind: str) -> None:
    model = compiled(kind)
    cache = begun(model, 70, 2)
    slots, ids = cache.bytes, tiny.tokens(2, 8, 3)
    forks = [cache.fork() for _ in range(8)]
    assert kvpass.Cache.held([cache, *forks]) == slots
    assert kvpass.report([one.host for one in forks]).to_dict()["bytes"] == slots
    want = gone_on(model, kvpass.Cache(copy.deepcopy(cache.host)), ids)
    same(gone_on(model, forks[0], ids), want)
    assert kvpass.Cache.held([cache, *forks]) == slots + forks[0].bytes
    for other in (cache, forks[1]):
        same(gone_on(model, other, ids), want)
    del forks[3:]
    assert kvpass.Cache.held(forks) == forks[0].bytes + forks[1].bytes + forks[2].bytes
    state = [layer.positions for layer in forks[2]]
    assert all(torch.equal(x, y.positions) for x, y in zip(state, forks[2].fork(), strict=True))


def test_a_fork_of_2000_tokens_into_8() -> None:
    """Of all forks, the last one that is left needs no copy: its slots are where they were."""
    model = kvpass.compile(tiny.one_llama(), "h2o", 400, inner="eager")
    cache = begun(model, 2000, steps=0)
    forks = [cache.fork() for _ in range(8)]
    slots = cache.bytes
    assert kvpass.Cache.held(forks) == slots < 0.22 * kvpass.report(cache).to_dict()["dense_bytes"]
    del cache, forks[1:]
    gc.collect()  # what a first trace keeps of its inputs is in a cycle
    state = find(forks[0].host.layers[0].keys).state
    fed(model, forks[0], tiny.tokens(1, 1))
    assert find(forks[0].host.layers[0].keys).state is state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(4)
def test_requests_join_and_leave(kind: str) -> None:
    """Two batches of unequal length become one, and rows of it another one: each says what it would have said alone,
    and keeps what it would have kept.
    """
    model = compiled(kind)
    one, two = begun(model, 60, 2, seed=1), begun(model, 85, 1, seed=7)
    merged = kvpass.Cache.merge([one, two])
    assert (merged.rows, merged.tokens, merged.padding.tolist()) == (3, 86, [25, 25, 0])
    ids = tiny.tokens(3, 8, 11)
    got = gone_on(model, merged, ids, masked=True)
    same(got, torch.cat([gone_on(model, one, ids[:2]), gone_on(model, two, ids[2:])]))
    for all_, first, last in zip(merged, one, two, strict=True):
        for row, alone in enumerate([*first.positions, *last.positions]):
            for head, own in zip(all_.positions[row], alone, strict=True):
                assert (head[head >= 0] - merged.padding[row]).tolist() == own[own >= 0].tolist()
    left = merged.select([2, 0])
    assert merged.rows == 3
    ids = tiny.tokens(3, 7, 13)
    got = gone_on(model, left, ids[[2, 0]], masked=True)
    same(got, torch.cat([gone_on(model, two, ids[2:]), gone_on(model, one, ids[:2])[:1]]))
    many = left.repeat(2)
    assert many.padding.tolist() == [0, 0, 25, 25]


@pytest.mark.parametrize("ways", [(copy.deepcopy, pickled), (pickled, copy.deepcopy), (pickled, pickled)])
def test_caches_of_other_processes_join(ways: Any) -> None:
    """One whose model is known by its content alone, in either place; and one of other weights, which does not."""
    model = compiled("even")
    one, two = (way(begun(model, 60, 1, seed=at)) for at, way in enumerate(ways))
    merged = kvpass.Cache.merge([one, two])
    assert merged.rows == 2
    weights = tiny.llama()
    with torch.no_grad():
        weights.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other = kvpass.compile(weights, *KINDS["even"], inner="eager")
    with pytest.raises(StaleCacheError, match="other weights"):
        kvpass.Cache.merge([merged, pickled(begun(other, 60, 1))])


def test_no_new_graphs_when_requests_come_and_go() -> None:
    model = compiled()
    batch = kvpass.Cache.merge([begun(model, 60, 2), begun(model, 40, 2)])
    for _ in range(2):
        batch = kvpass.Cache.merge([batch, begun(model, 50, 2)]).select([5, 1, 2, 3])
        mask = torch.cat([batch.mask(), torch.ones(4, 1, dtype=torch.long)], 1)
        fed(model, batch, tiny.tokens(4, 1), mask)
    graphs = len(model.kvpass.graphs)
    for rows in ([0, 1, 2], [0, 1, 2, 3, 0, 1]):
        other = kvpass.Cache.merge([batch, begun(model, 50, 2)]).select(rows)
        mask = torch.cat([other.mask(), torch.ones(len(rows), 1, dtype=torch.long)], 1)
        fed(model, other, tiny.tokens(len(rows), 1), mask)
    assert len(model.kvpass.graphs) <= graphs + 1  # the first other batch size makes it a symbol


def test_evictions_that_wait_are_done_before() -> None:
    """Rows that joined keep what they would have kept if everything had been evicted then."""
    model = kvpass.compile(tiny.one_llama(), {"name": "mine", "extends": "h2o", "every": 4}, 40, inner="eager")
    one, two = begun(model, 60, steps=3), begun(model, 60, steps=1)
    merged = kvpass.Cache.merge([one, two])
    assert [int((layer.positions >= 0).sum(-1).max()) for layer in merged] == [40, 40]
    assert [int((layer.positions >= 0).sum(-1).max()) for layer in one] == [43, 43]
    alike = kvpass.Cache.merge([begun(model, 60, steps=1), two])
    ids = tiny.tokens(1, 8, 3)
    same(gone_on(model, alike, ids.repeat(2, 1), masked=True)[1:], gone_on(model, two, ids))


def test_a_static_cache_made_in_a_call() -> None:
    model = compiled()
    host = StaticCache(config=tiny.one_llama().config, max_cache_len=90)
    cache = kvpass.Cache(host)
    fed(model, cache, tiny.tokens(3, 60))
    fed(model, cache, tiny.tokens(3, 1))
    picked, ids = cache.select([2, 0]), tiny.tokens(3, 1, 3)
    host_picked = copy.deepcopy(host)
    host_picked.reorder_cache(torch.tensor([2, 0]))
    want = fed(model, cache.fork(), ids)[[2, 0]]
    same(fed(model, picked, ids[[2, 0]]), want)
    same(fed(model, host_picked, ids[[2, 0]]), want)
    same(fed(model, cache, ids)[[2, 0]], want)


def test_buffers_of_the_callers() -> None:
    """By the object rows are picked; by hand a buffer's zeros are copied, and refused."""
    model = compiled()
    host = StaticCache(config=tiny.one_llama().config, max_cache_len=90)
    host.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    fed(model, host, tiny.tokens(2, 60))
    picked, ids = kvpass.Cache(host).select([1, 1, 0]), tiny.tokens(2, 1, 3)
    by_hand = copy.deepcopy(host)
    want = fed(model, host, ids)
    same(fed(model, picked, ids[[1, 1, 0]]), want[[1, 1, 0]])
    by_hand.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(CacheError, match="did not make"):
        fed(model, by_hand, ids)


@pytest.mark.parametrize("how", ["HF", "tuple"])
def test_crop(how: str) -> None:
    if how == "HF":
        model = kvpass.compile(tiny.one_llama(), "full", inner="eager")
        cache = begun(model, 60, steps=0)
    else:
        decoder = kvpass.compile(plain.one(plain.Decoder), "full", inner="eager")
        with torch.no_grad():
            cache = kvpass.Cache(decoder(plain.tokens(1, 60), None))
    fork = cache.fork()
    cache.crop(0)
    cache.crop(7)
    assert (cache.tokens, fork.tokens) == (53, 60)
    with torch.no_grad():
        if how == "HF":
            want = tiny.one_llama()(torch.cat([tiny.tokens(1, 60)[:, :53], tiny.tokens(1, 1, 3)], 1)).logits
            same(fed(model, cache, tiny.tokens(1, 1, 3)), want[:, -1:])
            fed(model, fork, tiny.tokens(1, 1, 3))
        else:
            want, _ = plain.one(plain.Decoder)(torch.cat([plain.tokens(1, 60)[:, :53], plain.tokens(1, 1, 3)], 1))
            same(decoder(plain.tokens(1, 1, 3), cache)[0], want[:, -1:])
    for n in (-1, 60):
        with pytest.raises(CacheError, match="are to be taken back"):
            cache.crop(n)


def test_what_is_refused() -> None:
    model, cache = compiled(), begun(compiled(), 60, 2)
    with pytest.raises(CacheError, match="cannot be taken back"):
        cache.crop(3)
    for rows in ([], [2], [-1], [0.5], [[0]], torch.tensor([True]), "ab"):
        with pytest.raises(CacheError):
            cache.select(rows)
    assert cache.select(torch.tensor([False, True])).rows == 1
    with pytest.raises(StaleCacheError, match="was made by this model under policy"):
        kvpass.Cache.merge([cache, begun(compiled("ragged"), 60)])
    for caches in ([], [cache, DynamicCache(config=tiny.one_llama().config)]):
        with pytest.raises(CacheError):
            kvpass.Cache.merge(caches)
    hidden = torch.cat([torch.ones(2, 61), torch.tensor([[1, 1], [1, 0]])], 1).long()
    fed(model, cache, tiny.tokens(2, 2), hidden)
    with pytest.raises(CacheError, match="row 1"):
        cache.mask()
