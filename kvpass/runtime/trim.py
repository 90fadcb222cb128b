"""Columns that stand before every row's first token, and slots that shorter rows need no more, given back."""

from __future__ import annotations

import torch

from kvpass.kernels.budget import within
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.cursor import EXTRA, LIVE
from kvpass.kernels.slots.moves import with_places, with_slots
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.rows import moved_along
from kvpass.kernels.slots.state import State
from kvpass.runtime.room import spare_slots
from kvpass.runtime.store import SlotStore


def trimmed(store: SlotStore, columns: int) -> SlotStore:
    """Another store without the first `columns` columns, which are padding of all rows, and without the slots that no
    row can fill so soon. It may share memory with the given one, which must not be used any more.
    """
    tokens, used = store.tokens - columns, store.used
    with torch.inference_mode(False), torch.no_grad():
        state = moved_along(store.state, torch.full((len(store.state.cursor),), -columns))
        if not store.rule[ShareOut].share:  # those are laid out anew whenever rows are picked
            used = _fullest(state)
            slots = used + spare_slots(used)
            state = state if state.slots <= slots else with_slots(state, slots)
        if store.rule.demotes:
            whole = within(store.rule, tokens)
            places = whole + spare_slots(whole)
            state = state if state.places <= places else with_places(state, places)
    return store.with_state(state, tokens=tokens, used=used)


def _fullest(state: State) -> int:
    """Slots in use in the fullest head, beside those that it has of other heads."""
    live = state.cursor[..., LIVE]
    return int((live - state.cursor[..., EXTRA] if is_ragged(state.cursor) else live).max())
