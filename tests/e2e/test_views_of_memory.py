"""A buffer is known by its memory: fresh views of one stack at each call are one cache, other cuts of it are not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.hosts import DIM, HEADS, LAYERS, ROOM, Decoder, Pair
from torch import Tensor

import kvpass
from kvpass.errors import ForeignCacheError, StaleCacheError

GRAPHS, BUDGET, SINKS = 4, 12, 4
Cut = Callable[[Tensor, int], Pair]


class Buffers(Decoder):
    """Buffers of all layers come in as a list of pairs, and a number says where to write."""

    def forward(self, ids: Tensor, pairs: list[Pair], start: int) -> Tensor:
        end = start + ids.shape[1]

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            keys, values = pairs[layer]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            return keys[:, :, :end], values[:, :, :end]

        return self.run(ids, start, cached)


def by_index(stack: Tensor, layer: int) -> Pair:
    return stack[layer, 0], stack[layer, 1]


def by_select(stack: Tensor, layer: int) -> Pair:
    return stack.select(0, layer).select(0, 0), stack.select(0, layer).select(0, 1)


def unbound(stack: Tensor, layer: int) -> Pair:
    return stack.unbind(0)[layer].unbind(0)  # type: ignore[return-value]  # as many as it has


def viewed(stack: Tensor, layer: int) -> Pair:
    flat = stack.view(LAYERS * 2, 1, HEADS, ROOM, DIM)
    return flat[2 * layer], flat[2 * layer + 1]


def sliced(stack: Tensor, layer: int) -> Pair:
    return stack[layer, 0][:1], stack[layer, 1][:1]


def narrowed(stack: Tensor, layer: int) -> Pair:
    return stack.narrow(0, layer, 1)[0, 0], stack.narrow(0, layer, 1)[0, 1]


CUTS = [by_index, by_select, unbound, viewed, sliced, narrowed]


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def converse(model: Any, stack: Tensor, cut: Cut, prompt: int, steps: int) -> Tensor:
    start, logits = 0, []
    with torch.no_grad():
        for at in range(steps + 1):
            ids = tokens(prompt if at == 0 else 1, at)
            logits.append(model(ids, [cut(stack, layer) for layer in range(LAYERS)], start)[:, -1])
            start += ids.shape[1]
    return torch.stack(logits)


def make_stack() -> Tensor:
    return torch.zeros(LAYERS, 2, 1, HEADS, ROOM, DIM)


def compiled(policy: str = "streaming_llm", budget: Any = BUDGET) -> Any:
    return kvpass.compile(Buffers().eval(), policy, budget, inner="eager")


def step(model: Any, pairs: list[Pair], start: int) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens(1, 7), pairs, start)
    return result


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: str(cut.__name__))
@pytest.mark.some(3)
def test_fresh_views_are_the_cache(cut: Cut) -> None:
    model, stack = compiled("full", None), make_stack()
    for prompt, steps in ((30, 40), (37, 5)):  # the second conversation in the same memory
        expected = converse(Buffers().eval(), make_stack(), cut, prompt, steps)
        torch.testing.assert_close(converse(model, stack, cut, prompt, steps), expected, rtol=1e-4, atol=1e-5)
    assert len(model.kvpass.graphs) <= GRAPHS


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: str(cut.__name__))
def test_they_keep_what_the_policy_says(cut: Cut) -> None:
    model, stack = compiled(), make_stack()
    converse(model, stack, cut, 30, 5)
    kept = [*range(SINKS), *range(35 - BUDGET + SINKS, 35)]
    for layer in kvpass.inspect(stack).layers:
        assert all(sorted(head.tolist()) == kept for row in layer.positions for head in row)
    data = kvpass.report([cut(stack, layer) for layer in range(LAYERS)]).to_dict()
    assert data["slot_bytes"] == LAYERS * 2 * HEADS * (BUDGET + 1) * DIM * 4
    assert data["caller_bytes"] == stack.untyped_storage().nbytes()


def test_cuts_may_change_from_call_to_call() -> None:
    model, stack = compiled("full", None), make_stack()
    first = converse(model, stack, by_index, 30, 0)
    expected = converse(Buffers().eval(), make_stack(), by_index, 30, 0)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    for at, cut in enumerate(CUTS):
        step(model, [cut(stack, layer) for layer in range(LAYERS)], 30 + at)


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True)])
def test_inference_mode(modes: tuple[bool, bool]) -> None:
    """The stack is made, and the calls are made, in inference mode or not."""
    model = compiled("full", None)
    with torch.inference_mode(modes[0]):
        stack = make_stack()
    with torch.inference_mode(modes[1]):
        found = converse(model, stack, by_index, 30, 3)
    expected = converse(Buffers().eval(), make_stack(), by_index, 30, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["stack", "views"])
def test_copies_go_their_own_way(what: str) -> None:
    model, stack = compiled("full", None), make_stack()
    converse(model, stack, by_index, 30, 2)
    pairs = [by_index(stack, layer) for layer in range(LAYERS)]
    step(model, pairs, 32)
    other = copy.deepcopy(stack) if what == "stack" else copy.deepcopy(pairs)
    theirs = [by_index(other, layer) for layer in range(LAYERS)] if isinstance(other, Tensor) else other
    a = step(model, pairs, 33)
    torch.testing.assert_close(step(model, theirs, 33), a)
    step(model, theirs, 34)
    step(model, pairs, 34)
    found = {id(store) for cache in (pairs, theirs) for store in _stores(cache)}
    assert len(found) == 2 * LAYERS


def _stores(cache: Any) -> list[Any]:
    from kvpass.api.holdings import stores

    return stores(cache)


def test_another_cut_is_refused_by_name() -> None:
    """Two rows of which one is begun; the memory of layer 0 shifted by a token; keys as values."""
    model, stack = compiled(), torch.zeros(LAYERS, 2, 2, HEADS, ROOM, DIM)
    converse(model, stack, lambda s, n: (s[n, 0, :1], s[n, 1, :1]), 30, 1)
    with pytest.raises(StaleCacheError, match="another part of the memory"), torch.no_grad():
        model(tokens(1, 7).repeat(2, 1), [by_index(stack, layer) for layer in range(LAYERS)], 31)
    with pytest.raises(StaleCacheError, match="another part of the memory"):
        step(model, [(stack[n, 0, :1, :, :-1], stack[n, 1, :1, :, :-1]) for n in range(LAYERS)], 31)
    with pytest.raises(StaleCacheError, match="given as values"):
        step(model, [(stack[n, 1, :1], stack[n, 0, :1]) for n in range(LAYERS)], 31)
    with pytest.raises(ForeignCacheError):  # the other row: nobody began it
        step(model, [(stack[n, 0, 1:], stack[n, 1, 1:]) for n in range(LAYERS)], 31)
    step(model, [(stack[n, 0, :1], stack[n, 1, :1]) for n in range(LAYERS)], 31)


def test_rows_have_caches_of_their_own() -> None:
    """Two conversations in two rows of one stack, turn by turn."""
    model, stack = compiled("full", None), torch.zeros(LAYERS, 2, 2, HEADS, ROOM, DIM)
    rows = [[(stack[n, 0, r : r + 1], stack[n, 1, r : r + 1]) for n in range(LAYERS)] for r in (0, 1)]
    original, plain = Buffers().eval(), [[(t.clone(), u.clone()) for t, u in row] for row in rows]
    with torch.no_grad():
        for start, length in ((0, 30), (30, 1), (31, 1)):
            for r in (0, 1):
                ids = tokens(length, start + r)
                fresh = [(stack[n, 0, r : r + 1], stack[n, 1, r : r + 1]) for n in range(LAYERS)]
                found, expected = model(ids, fresh, start), original(ids, plain[r], start)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_new_beginning_ends_what_it_overlaps() -> None:
    model, stack = compiled(), torch.zeros(LAYERS, 2, 2, HEADS, ROOM, DIM)
    one = [(stack[n, 0, :1], stack[n, 1, :1]) for n in range(LAYERS)]
    both = [by_index(stack, n) for n in range(LAYERS)]
    with torch.no_grad():
        model(tokens(30, 1), one, 0)
        model(tokens(30, 1).repeat(2, 1), both, 0)
    with pytest.raises(StaleCacheError, match="another part of the memory"):
        step(model, one, 30)


def test_stores_die_with_the_memory() -> None:
    model, stack = compiled(), make_stack()
    converse(model, stack, by_index, 30, 2)
    alive = [weakref.ref(store) for store in _stores(stack)]
    assert len(alive) == LAYERS
    view = stack[0]
    del stack
    gc.collect()
    assert all(store() is not None for store in alive), "a view holds the memory"
    del view
    gc.collect()
    assert not any(store() for store in alive)
