"""States with more, fewer or other slots, and rows of states: what each of their fields does follows from its dims."""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.slots.cursor import EXTRA, FREE, LIVE, SHIFT
from kvpass.kernels.slots.ragged import is_ragged, laid_out, places, starts, used_slots
from kvpass.kernels.slots.state import Field, State, flat
from torch import Tensor

PIECES = 8
"""Slots of heads of unequal budgets are carried so many parts at a time."""


def unused(state: State, slots: int, cursor: Tensor) -> State:
    """A state with another cursor and `slots` slots per head, none in use; what belongs to heads is as it was."""

    def renewed(field: Field, tensor: Tensor) -> Tensor:
        if not field.per_slot:
            return tensor
        return field.new({**dict(zip(field.dims, tensor.shape, strict=True)), "C": slots}, tensor)

    return state.mapped(renewed).replaced(cursor=cursor)


def with_slots(state: State, slots: int) -> State:
    """A copy with so many slots for each head (on average), all of which that are in use among the first ones."""
    return _moved(state, state.cursor, slots) if is_ragged(state.cursor) else _resized(state, slots)


def _resized(state: State, slots: int) -> State:
    out, common = unused(state, slots, state.cursor), min(slots, state.slots)
    for (field, old), (_, new) in zip(state.per_slot(), out.per_slot(), strict=True):
        axis = field.dims.index("C")
        new.narrow(axis, 0, common).copy_(old.narrow(axis, 0, common))
    return out


def with_places(state: State, places: int) -> State:
    """A copy with so many places for each head beside the slots (W); those that are in use are among the first ones."""

    def resized(field: Field, tensor: Tensor) -> Tensor:
        if "W" not in field.dims:
            return tensor
        axis = field.dims.index("W")
        new = field.new({**dict(zip(field.dims, tensor.shape, strict=True)), "W": places}, tensor)
        common = min(places, tensor.shape[axis])
        new.narrow(axis, 0, common).copy_(tensor.narrow(axis, 0, common))
        return new

    return state.mapped(resized)


def with_spare(state: State, spare: int) -> tuple[State, int]:
    """The state with room for `spare` more tokens, or a few less, behind those that each head holds, and for how many.
    A copy.
    """
    cursor, slots, free = laid_out(state.cursor, spare)
    return _moved(state, cursor, slots), free


def evened(state: State, spare: int) -> State:
    """The state with as many slots for each head: those of the fullest, and `spare` more. A copy."""
    cursor = state.cursor.clone()
    cursor[..., EXTRA:] = 0
    return _moved(state, cursor, used_slots(cursor) + spare)


def _moved(state: State, cursor: Tensor, slots: int) -> State:
    """The used slots, where another cursor says."""
    before, out = state.cursor, unused(state, slots, cursor)
    offset = torch.arange(used_slots(before), device=cursor.device)
    used = offset < (before[..., LIVE] + (before[..., FREE] < before[..., LIVE]))[..., None]
    _carry(state, out, offset.expand(used.shape), used)
    return out


def with_chosen(state: State, chosen: Tensor, cursor: Tensor) -> State:
    """The slots int [B, Hkv, n] of each head, -1 for none, first and in their order, under another cursor; as many
    places as before. A copy.
    """
    out = unused(state, state.slots, cursor)
    _carry(state, out, chosen, chosen >= 0)
    return out


def _carry(state: State, out: State, chosen: Tensor, used: Tensor) -> None:
    """Write each head's chosen slots [B, Hkv, n], where they are used, to the same places of that head in another
    state. In pieces: what is read of one lies beside both.
    """
    offset = torch.arange(chosen.shape[2], device=chosen.device)
    old = (starts(state.cursor, state.slots)[..., None] + chosen)[used]
    new = (starts(out.cursor, out.slots)[..., None] + offset)[used]
    size = max(-(-len(old) // PIECES), 1)
    for (field, source), (_, target) in zip(state.per_slot(), out.per_slot(), strict=True):
        for there, here in zip(new.split(size), old.split(size), strict=True):
            flat(field, target).index_copy_(field.rows, there, flat(field, source).index_select(field.rows, here))


def even(state: State) -> State:
    """The state with as many slots for each head: itself, or a copy if it is ragged."""
    return side_by_side(state, used_slots(state.cursor)) if is_ragged(state.cursor) else state


def side_by_side(state: State, slots: int) -> State:
    """A copy of a ragged state with the first `slots` slots of each head; where it has none, they are empty."""
    index, exist = places(state.cursor, state.slots, slots)

    def picked(field: Field, tensor: Tensor) -> Tensor:
        return _picked(field, tensor, index, exist, field.fill or 0) if field.per_slot else tensor

    return state.mapped(picked).replaced(cursor=state.cursor[..., :EXTRA])


def _picked(field: Field, tensor: Tensor, index: Tensor, exist: Tensor, fill: Any) -> Tensor:
    """Slots [B, H, n] of the flattened memory, `fill` where they do not exist. A copy."""
    picked = flat(field, tensor).index_select(field.rows, index.flatten()).unflatten(field.rows, index.shape)
    behind = [1] * (len(field.dims) - field.rows - 3)
    result: Tensor = picked.masked_fill_(~exist.view(*exist.shape, *behind), fill)
    return result


def rows_of(state: State, rows: Tensor) -> State:
    """The sequences `rows` (int64 [n], with repeats) of a state whose slots layers do not share out
    (`kvpass.kernels.slots.rows`): heads with budgets of their own lie within their row's part of the memory. A copy.
    """
    return state.mapped(lambda field, tensor: tensor.index_select(field.rows, rows))


def row_of(state: State, b: int) -> State:
    """The state of one sequence: views, or copies if it is ragged (`put_row` brings them back)."""
    if not is_ragged(state.cursor):
        return state.mapped(lambda field, tensor: tensor.narrow(field.rows, b, 1))
    index, used, own = _row_places(state, b)

    def picked(field: Field, tensor: Tensor) -> Tensor:
        if not field.per_slot:
            return tensor.narrow(field.rows, b, 1)
        there = used if field.name == "pos" else torch.ones_like(used)
        return _picked(field, tensor, index, there, -1)

    return state.mapped(picked).replaced(cursor=own)


def put_row(state: State, row: State, b: int) -> None:
    """Bring a step's changes of `row_of` back, in place."""
    if not is_ragged(state.cursor):
        return
    index, used, _ = _row_places(state, b)
    there, own = index[used], used.flatten().nonzero().flatten()
    for (field, target), (_, source) in zip(state.per_slot(), row.per_slot(), strict=True):
        part = flat(field, source.contiguous()).index_select(field.rows, own)
        flat(field, target).index_copy_(field.rows, there, part)
    state.cursor[b, :, :SHIFT] = row.cursor[0, :, :SHIFT]


def _row_places(state: State, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places int64 [1, Hkv, n] of a sequence's slots, the next token's too, which of them are used, and its cursor in
    memory of its own.
    """
    cursor = state.cursor[b : b + 1].clone()
    offset = torch.arange(used_slots(cursor) + 1, device=cursor.device)
    used = offset <= cursor[..., LIVE, None]
    found = starts(state.cursor, state.slots)[b : b + 1, :, None] + offset
    cursor[..., SHIFT] = 0
    return torch.where(used, found, 0), used, cursor
