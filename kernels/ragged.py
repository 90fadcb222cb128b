"""Ragged slots: heads of a layer that hold different numbers of keys in one piece of memory.

The state's tensors keep their shapes [.., B, Hkv, C, ..]; head (b, h) has its slots in a row from place
(b * Hkv + h) * C + SHIFT on, in the flattened memory. The EXTRA slots of the heads add up to no more than 0, so nothing
overlaps, and a longer C keeps every SHIFT.
"""

from __future__ import annotations

import torch
from kvpass.kernels.rule import EXTRA, LIVE, SHIFT
from torch import Tensor


def is_ragged(cursor: Tensor) -> bool:
    """Whether heads have budgets of their own."""
    return cursor.shape[-1] > SHIFT


def starts(cursor: Tensor, slots: int) -> Tensor:
    """Place of each head's slot 0 in the flattened memory: int64 [B, Hkv]."""
    batch, heads = cursor.shape[:2]
    even = torch.arange(batch * heads, device=cursor.device).view(batch, heads) * slots
    return even + cursor[..., SHIFT] if is_ragged(cursor) else even


def rooms(cursor: Tensor, slots: int) -> Tensor:
    """Slots that each head has, int64 [B, Hkv]."""
    extra = cursor[..., EXTRA].long() if is_ragged(cursor) else 0
    return torch.full(cursor.shape[:2], slots, device=cursor.device) + extra


def places(cursor: Tensor, slots: int, width: int) -> tuple[Tensor, Tensor]:
    """Places int64 [B, Hkv, width] of each head's first slots in the flattened memory, and which exist (else 0)."""
    offset = torch.arange(width, device=cursor.device)
    exist = offset < rooms(cursor, slots)[..., None]
    return torch.where(exist, starts(cursor, slots)[..., None] + offset, 0), exist


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


def write_back(x: Tensor, wide: Tensor, cursor: Tensor) -> None:
    """The inverse of `padded`: writes [.., B, Hkv, width] into the slots of x [.., B, Hkv, C], in place."""
    index, exist = places(cursor, x.shape[-1], wide.shape[-1])
    x.view(*x.shape[:-3], x.shape[-3:].numel())[..., index[exist]] = wide[..., exist]


def used_slots(cursor: Tensor) -> int:
    """Slots in use in the fullest head, a hole included."""
    return int(cursor[..., LIVE].max()) + 1


def lengthened(state: list[Tensor], slots: int) -> list[Tensor]:
    """The state (k, v, pos, stats, cursor) with `slots` slots per head on average. A copy, but for the cursor."""
    k, v, pos, stats, cursor = state
    old, exist = places(cursor, k.shape[2], used_slots(cursor))
    new = (starts(cursor, slots)[..., None] + torch.arange(old.shape[-1], device=old.device))[exist]
    old = old[exist]
    batch, heads = cursor.shape[:2]
    out = [
        k.new_empty(batch, heads, slots, k.shape[3]),
        v.new_empty(batch, heads, slots, v.shape[3]),
        pos.new_full((batch, heads, slots), -1),
        stats.new_zeros(stats.shape[0], batch, heads, slots),
    ]
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
