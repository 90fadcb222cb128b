"""Sequences picked out of a compressed cache, as beam search does; tokens taken back, where that can be exact."""

from __future__ import annotations

import torch

from kvpass.errors import StaleCacheError
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.cursor import FREE, LIVE, SEEN
from kvpass.kernels.slots.moves import rows_of
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.runtime.branches import Cuts
from kvpass.runtime.store import Pick, SlotStore

MOST = 256
"""Picks of a store that wait for their other half: who only looks at a few keys never asks for the values."""


def selected(store: SlotStore, rows: torch.Tensor, half: int) -> SlotStore:
    """A store of the sequences `rows` (int [N], with repeats) of another.

    Keys and values are picked one after the other, by equal rows: both get the same new store.

    Args:
        half: 0 if it is asked for keys, 1 for values.

    Raises:
        StaleCacheError: a call on the store failed halfway.
    """
    for at, pick in enumerate(store.picked):
        if pick.half == half and pick.store.tokens == store.tokens and torch.equal(pick.rows, rows):
            del store.picked[at]
            return pick.store
    result = with_rows(store, rows)
    store.picked = [*store.picked[1 - MOST :], Pick(rows.clone(), result, 1 - half)]
    return result


def with_rows(store: SlotStore, rows: torch.Tensor) -> SlotStore:
    """Another store of these sequences (int [N], with repeats).

    Raises:
        StaleCacheError: a call on the store failed halfway.
    """
    require_whole(store)
    spare = store.spare
    with torch.inference_mode(False), torch.no_grad():
        at = rows.to(store.state.k.device).long()
        if store.rule[ShareOut].share:
            from kvpass.kernels.slots.rows import rows_laid_out

            state, spare = rows_laid_out(store.state, at, spare)
        else:
            state = rows_of(store.state, at)
        zero = None if store.zero is None else store.zero[at]
    return store.with_state(state, zero=zero, spare=spare)


def require_whole(store: SlotStore) -> None:
    """Raises StaleCacheError if a call on a store failed halfway."""
    if store.spoiled:
        raise StaleCacheError(
            "an earlier call on this cache failed halfway: none of its sequences can go on",
            where=store.name,
            hint="begin again from an empty cache",
        )


def take_back(store: SlotStore, length: int) -> bool:
    """Shorten a cache to its first `length` tokens, in place; False if that would not be exact: if the others were not
    tentative, and may have displaced or scored something.
    """
    if store.journal is not None and store.journal.take_back(store, length):
        store.cuts = (store.cuts or Cuts()).after(length)
        return True
    from kvpass.kernels.after_call.undoing import displaced_copies  # and what it knows of, not with `import kvpass`

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
