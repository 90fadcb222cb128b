"""Sequences picked out of a compressed cache, as beam search does; tokens taken back, where that can be exact."""

from __future__ import annotations

import torch

from kvpass.errors import CacheError
from kvpass.kernels.after_call.undoing import displaced_copies
from kvpass.kernels.slots.cursor import FREE, LIVE, SEEN
from kvpass.kernels.slots.moves import rows_of
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.runtime.branches import Cuts
from kvpass.runtime.store import SlotStore


def selected(store: SlotStore, rows: torch.Tensor, half: int) -> SlotStore:
    """A store of the sequences `rows` (int [N], with repeats) of another.

    Keys and values are picked one after the other, by equal rows: both get the same new store.

    Args:
        half: 0 if it is asked for keys, 1 for values.

    Raises:
        CacheError: heads have budgets of their own, which lie one behind the other over all sequences.
    """
    last = store.picked
    if last is not None and half not in last[2] and torch.equal(last[0], rows):
        last[2].add(half)
        return last[1]
    if is_ragged(store.state.cursor) or store.length is not None:
        raise CacheError(
            "sequences cannot be picked out of this cache yet (beam search, reordering)",
            where=store.name,
            hint="choose a policy whose heads hold the same number of slots, and a cache that grows; or num_beams=1",
        )
    with torch.inference_mode(False), torch.no_grad():
        at = rows.to(store.state.k.device).long()
        state = rows_of(store.state, at)
        bases = tuple(base.clone() for base in store.bases)
        zero = None if store.zero is None else store.zero[at]
    result = object.__new__(SlotStore)
    result.__setstate__({**vars(store), "state": state, "bases": bases, "zero": zero, "picked": None})
    store.picked = rows.clone(), result, {half}
    return result


def take_back(store: SlotStore, length: int) -> bool:
    """Shorten a cache to its first `length` tokens, in place; False if that would not be exact: if the others were not
    tentative, and may have displaced or scored something.
    """
    if store.journal is not None and store.journal.take_back(store, length):
        store.cuts = (store.cuts or Cuts()).after(length)
        return True
    if store.rule.evicts or is_ragged(store.state.cursor) or displaced_copies(store.state, store.rule):
        return False
    pos, cursor = store.state.pos, store.state.cursor
    with torch.inference_mode(False), torch.no_grad():
        gone = pos >= length
        pos.masked_fill_(gone, -1)
        removed = gone.sum(-1, dtype=cursor.dtype)
        for column in (LIVE, FREE, SEEN):
            cursor[..., column] -= removed
    store.tokens, store.cuts = length, (store.cuts or Cuts()).after(length)
    return True


def still_tentative(store: SlotStore) -> str:
    """What can be taken back of a cache, for an error that says that something cannot."""
    if store.journal is None or not store.journal.entries:
        return "evicted tokens cannot come back: only those that come inside of `with kvpass.tentative(depth=..)` can"
    return (
        f"only its last {len(store.journal.entries)} tokens are tentative and can be taken back: "
        "open kvpass.tentative with a larger depth"
    )
