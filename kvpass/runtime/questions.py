"""Rows whose last call is too short for its queries to judge what was there, say a question."""

from __future__ import annotations

import torch

from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.ragged import padded, used_slots
from kvpass.kernels.timing import Timing
from kvpass.runtime.store import SlotStore


def arrived(store: SlotStore, before: int) -> torch.Tensor:
    """Valid tokens of each row behind the first `before` ones of a cache: int64 [B, 1]. All of these must be there."""
    pos = padded(store.state.pos, store.state.cursor, used_slots(store.state.cursor), -1)
    return (pos[:, :1] >= before).sum(-1)


def unread(store: SlotStore, before: int) -> torch.Tensor:
    """Rows whose last call, behind the first `before` tokens of the cache, is neither looked at nor replayed, for it
    went on from others and is too short: bool [B].
    """
    new = arrived(store, before)
    had = store.state.cursor[:, :1, SEEN] > new
    return (had & (new < store.rule[Timing].shortest))[:, 0]


def staying(store: SlotStore, before: int) -> torch.Tensor | None:
    """Rows that drop nothing at the end of that call: bool [B]; None where the budget holds at every token."""
    timing = store.rule[Timing]
    return None if timing.when == "always" or timing.shortest == 1 else unread(store, before)
