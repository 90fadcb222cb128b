"""Stores of several batches become one: their rows stand behind each other, and all end at the same column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.kernels.after_call.deferred import evicted
from kvpass.kernels.budget import kept
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.rows import moved_along, stacked, stacked_laid_out
from kvpass.runtime.identity import require_same
from kvpass.runtime.pick import require_whole
from kvpass.runtime.store import SlotStore


def joined(stores: Sequence[SlotStore]) -> SlotStore:
    """A store of all rows of one layer's stores, in order. Rows of shorter ones are as if padding stood before them.

    Where evictions wait for more tokens (`Timing.every`), and not for the same number of them, all are done first: the
    steps of a batch are counted together.

    Raises:
        StaleCacheError: they are of different models, policies or budgets; or a call on one of them failed halfway.
        CacheError: they are of different layers, sizes, dtypes or devices.
    """
    longest = max(stores, key=lambda store: store.tokens)
    for store in stores:
        require_whole(store)
        require_same(store.origin, longest.origin, longest.name)
        if _made(store) != _made(longest):
            raise CacheError(
                "these caches are of different layers, sizes, dtypes or devices, or only some are preallocated",
                where=f"{longest.name} and {store.name}",
                hint="merge caches that one compiled model made in the same way",
            )
        if store.unplayed:
            raise CacheError(
                f"the last {store.unplayed} tokens of one of these caches were not replayed",
                where=store.name,
                hint="call kvpass.replay(model, cache, ids) for it first",
            )
    with torch.inference_mode(False), torch.no_grad():
        if len({store.waiting for store in stores}) > 1:
            stores = [_settled(store) for store in stores]
        states = [
            moved_along(store.state, torch.full((len(store.state.cursor),), longest.tokens - store.tokens))
            for store in stores
        ]
        spare = min(store.spare for store in stores)
        if longest.rule[ShareOut].share:
            state, spare = stacked_laid_out(states, spare)
        else:
            state = stacked(states)
        zero = _joined_zero(stores)
    return longest.with_state(
        state,
        spare=spare,
        zero=zero,
        waiting=stores[0].waiting,
        used=max(store.used for store in stores),
        calls=max(store.calls for store in stores),
        outside=max(store.outside for store in stores),
        step=next((store.step for store in stores if store.step is not None), None),
    )


def _made(store: SlotStore) -> tuple[Any, ...]:
    """What must be alike; sizes but for rows, slots and places."""
    alike = [
        (field.name, t.dtype, t.device, [n for dim, n in zip(field.dims, t.shape, strict=True) if dim not in "BCW"])
        for field, t in zip(store.state.fields, store.state.tensors(), strict=True)
    ]
    return store.name, store.layer, store.rule, store.layouts, store.host, store.length is None, alike


def _settled(store: SlotStore) -> SlotStore:
    """Without what waits to be evicted."""
    left = evicted(store.state, store.rule)
    return store.with_state(left, waiting=0, used=kept(store.rule, store.tokens), outside=store.outside + 1)


def _joined_zero(stores: Sequence[SlotStore]) -> torch.Tensor | None:
    """`SlotStore.zero` of all rows; rows without a token have none."""
    known = next((store.zero for store in stores if store.zero is not None), None)
    if known is None:
        return None
    return torch.cat(
        [known.new_zeros(len(s.state.cursor), known.shape[1]) if s.zero is None else s.zero for s in stores]
    )
