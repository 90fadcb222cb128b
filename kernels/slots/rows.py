"""Rows of states: picked, put behind each other, and moved along the sequence. Pure torch.

Heads with budgets of their own lie within their row's part of the memory, so that rows move like even ones
(`rows_of`); but for slots that layers shared out (`kvpass.kernels.rank.share_out`), which lie one behind the other over
all rows and are laid out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.slots.cursor import EXTRA, FIRST, SHIFT
from kvpass.kernels.slots.moves import evened, rows_of, with_places, with_slots, with_spare
from kvpass.kernels.slots.ragged import used_slots
from kvpass.kernels.slots.state import Field, State
from torch import Tensor


def rows_laid_out(state: State, rows: Tensor, spare: int) -> tuple[State, int]:
    """The sequences `rows` (int64 [n], with repeats) of a state whose slots layers shared out, with room for `spare`
    more tokens or a few less, and for how many.
    """
    return with_spare(rows_of(_evened(state), rows), max(spare, 1))


def stacked(states: Sequence[State]) -> State:
    """The rows of all states, in order; none of them shares slots out among layers. A copy."""
    slots, places = max(one.slots for one in states), max(one.places for one in states)
    sized = [one if one.slots == slots else with_slots(one, slots) for one in states]
    sized = [one if one.places == places else with_places(one, places) for one in sized]
    return _behind(sized)


def stacked_laid_out(states: Sequence[State], spare: int) -> tuple[State, int]:
    """The same of states whose slots layers shared out, with room as of `rows_laid_out`."""
    even = [_evened(one, max(used_slots(other.cursor) for other in states)) for one in states]
    return with_spare(_behind(even), max(spare, 1))


def moved_along(state: State, columns: Tensor) -> State:
    """The state as if so many columns of padding had stood before each row: int [B]. A copy of what changes."""
    by = columns.to(state.pos.device, torch.int32)

    def moved(field: Field, tensor: Tensor) -> Tensor:
        if not field.positions:
            return tensor
        more = by.view(-1, *[1] * (tensor.dim() - field.rows - 1))
        return torch.where(tensor < 0, tensor, tensor + more)

    cursor, first = state.cursor.clone(), state.cursor[..., FIRST]
    cursor[..., FIRST] = torch.where(first < 0, first, first + by[:, None])
    return state.mapped(moved).replaced(cursor=cursor)


def _behind(states: Sequence[State]) -> State:
    """States of as many slots and places, row behind row."""
    return states[0].mapped(lambda field, _: torch.cat([one[field.name] for one in states], field.rows))


def _evened(state: State, slots: int = 0) -> State:
    """As many slots for each head, at least `slots`, and what heads hold above the even budget as it was. A copy."""
    own = used_slots(state.cursor)
    even = evened(state, max(slots - own, 0))
    even.cursor[..., EXTRA:SHIFT] = state.cursor[..., EXTRA:SHIFT]
    return even
