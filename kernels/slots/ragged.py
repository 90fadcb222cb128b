"""Ragged slots: heads of a layer that hold different numbers of keys in one piece of memory.

The state's tensors keep their shapes [.., B, Hkv, C, ..]; head (b, h) has its slots in a row from place
(b * Hkv + h) * C + SHIFT on, in the flattened memory, up to the next head's. A longer C keeps every SHIFT.
"""

from __future__ import annotations

import torch
from kvpass.kernels.rule import EXTRA, FREE, LIVE, SHIFT
from torch import Tensor


def is_ragged(cursor: Tensor) -> bool:
    """Whether heads have budgets of their own."""
    return cursor.shape[-1] > SHIFT


def starts(cursor: Tensor, slots: int) -> Tensor:
    """Place of each head's slot 0 in the flattened memory: int64 [B, Hkv]."""
    batch, heads = cursor.shape[:2]
    even = torch.arange(batch * heads, device=cursor.device).view(batch, heads) * slots
    return even + cursor[..., SHIFT] if is_ragged(cursor) else even


def places(cursor: Tensor, slots: int, width: int) -> tuple[Tensor, Tensor]:
    """Places int64 [B, Hkv, width] of each head's first slots in the flattened memory, and which exist (else 0)."""
    first = starts(cursor, slots)
    end = first.new_full((1,), first.numel() * slots)
    room = first.flatten().diff(append=end).view(first.shape)
    offset = torch.arange(width, device=cursor.device)
    exist = offset < room[..., None]
    return torch.where(exist, first[..., None] + offset, 0), exist


def padded(x: Tensor, cursor: Tensor, width: int, fill: float) -> Tensor:
    """[.., B, Hkv, C] -> [.., B, Hkv, width]: each head's first slots, `fill` where it has none. A copy."""
    index, exist = places(cursor, x.shape[-1], width)
    flat = x.reshape(*x.shape[:-3], x.shape[-3:].numel())[..., index.flatten()]
    return flat.view(*x.shape[:-3], *index.shape).masked_fill_(~exist, fill)


def padded_rows(x: Tensor, cursor: Tensor, width: int) -> Tensor:
    """[B, Hkv, C, D] -> [B, Hkv, width, D]: the same for keys or values, 0 where a head has no slot. A copy."""
    index, exist = places(cursor, x.shape[2], width)
    rows = x.reshape(-1, x.shape[3])[index.flatten()].view(*index.shape, x.shape[3])
    return rows.masked_fill_(~exist[..., None], 0.0)


def row_of(state: list[Tensor], b: int) -> list[Tensor]:
    """The state of one sequence: views, or copies if it is ragged (`put_row` brings them back)."""
    k, v, pos, stats, cursor = state
    one = slice(b, b + 1)
    if not is_ragged(cursor):
        return [k[one], v[one], pos[one], stats[:, one], cursor[one]]
    index, used, own = _row_places(state, b)
    own_pos = pos.view(-1)[index].masked_fill_(~used, -1)
    rows = k.view(-1, k.shape[3])[index], v.view(-1, v.shape[3])[index]
    return [*rows, own_pos, stats.view(len(stats), pos.numel())[:, index], own]


def put_row(state: list[Tensor], row: list[Tensor], b: int) -> None:
    """Bring a step's changes of `row_of` back, in place."""
    k, v, pos, stats, cursor = state
    if not is_ragged(cursor):
        return
    index, used, _ = _row_places(state, b)
    there = index[used]
    k.view(-1, k.shape[3])[there] = row[0][used]
    v.view(-1, v.shape[3])[there] = row[1][used]
    pos.view(-1)[there] = row[2][used]
    stats.view(len(stats), pos.numel())[:, there] = row[3][:, used]
    cursor[b, :, :SHIFT] = row[4][0, :, :SHIFT]


def _row_places(state: list[Tensor], b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places int64 [1, Hkv, n] of a sequence's slots, the next token's too, which of them are used, and its cursor in
    memory of its own.
    """
    cursor = state[4][b : b + 1].clone()
    offset = torch.arange(used_slots(cursor) + 1, device=cursor.device)
    used = offset <= cursor[..., LIVE, None]
    places = starts(state[4], state[2].shape[2])[b : b + 1, :, None] + offset
    cursor[..., SHIFT] = 0
    return torch.where(used, places, 0), used, cursor


def used_slots(cursor: Tensor) -> int:
    """Slots in use in the fullest head, a hole included."""
    return int(cursor[..., LIVE].max()) + 1


def laid_out(cursor: Tensor, spare: int) -> tuple[Tensor, int, int]:
    """The cursor with a SHIFT for heads that hold LIVE slots and get free ones; C; and how many free ones each head
    gets: at most `spare`, at least one, so that C is no more than LIVE's mean + `spare`.
    """
    live = cursor[..., LIVE].flatten().long()
    heads, held = len(live), int(live.sum())
    slots = max(held // heads + spare, -(-held // heads) + 1)
    free = (heads * slots - held) // heads
    even = torch.arange(heads, device=live.device) * slots
    cursor = cursor.clone()
    cursor[..., SHIFT] = ((live + free).cumsum(0) - live - free - even).view(cursor.shape[:2]).int()
    return cursor, slots, free


def empty_like(state: list[Tensor], slots: int) -> list[Tensor]:
    """k, v, pos and stats of a state with `slots` slots per head, none in use."""
    k, v, pos, stats, _ = state
    batch, heads = pos.shape[:2]
    return [
        k.new_empty(batch, heads, slots, k.shape[3]),
        v.new_empty(batch, heads, slots, v.shape[3]),
        pos.new_full((batch, heads, slots), -1),
        stats.new_zeros(stats.shape[0], batch, heads, slots),
    ]


def lengthened(state: list[Tensor], slots: int) -> list[Tensor]:
    """The state (k, v, pos, stats, cursor) with `slots` slots per head on average. A copy, but for the cursor."""
    return _moved(state, state[4], slots)


def with_spare(state: list[Tensor], spare: int) -> tuple[list[Tensor], int]:
    """The state with room for `spare` more tokens, or a few less, behind those that each head holds, and for how many.
    A copy.
    """
    cursor, slots, free = laid_out(state[4], spare)
    return _moved(state, cursor, slots), free


def evened(state: list[Tensor], spare: int) -> list[Tensor]:
    """The state with as many slots for each head: those of the fullest, and `spare` more. A copy."""
    cursor = state[4].clone()
    cursor[..., EXTRA:] = 0
    return _moved(state, cursor, used_slots(cursor) + spare)


def _moved(state: list[Tensor], cursor: Tensor, slots: int) -> list[Tensor]:
    """The used slots, where another cursor says."""
    k, v, pos, stats, before = state
    offset = torch.arange(used_slots(before), device=pos.device)
    used = offset < (before[..., LIVE] + (before[..., FREE] < before[..., LIVE]))[..., None]
    old = (starts(before, k.shape[2])[..., None] + offset)[used]
    new = (starts(cursor, slots)[..., None] + offset)[used]
    out = empty_like(state, slots)
    for source, target in zip((k, v), out[:2], strict=True):
        target.view(-1, target.shape[3])[new] = source.reshape(-1, source.shape[3])[old]
    out[2].view(-1)[new] = pos.reshape(-1)[old]
    for at in range(len(stats)):
        out[3][at].view(-1)[new] = stats[at].reshape(-1)[old]
    return [*out, cursor]


def even(state: list[Tensor]) -> list[Tensor]:
    """The state (k, v, pos, stats, cursor) with as many slots for each head: itself, or a copy if it is ragged."""
    k, v, pos, stats, cursor = state
    if not is_ragged(cursor):
        return state
    width = used_slots(cursor)
    rows = padded_rows(k, cursor, width), padded_rows(v, cursor, width)
    return [*rows, padded(pos, cursor, width, -1), padded(stats, cursor, width, 0.0), cursor[..., :EXTRA]]
