"""Ragged slots: heads of a layer that hold different numbers of keys in one piece of memory.

The state's tensors keep their shapes [.., B, Hkv, C, ..]; head (b, h) has its slots in a row from place
(b * Hkv + h) * C + SHIFT on, in the flattened memory, up to the next head's. A longer C keeps every SHIFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.cursor import LIVE, SHIFT
from torch import Tensor


@dataclass(frozen=True)
class Ragged(Record):
    """Whether heads have budgets of their own."""

    ragged: bool = False


def columns(rule: Rule) -> int:
    """Width of the cursor."""
    return 6 if rule[Ragged].ragged else 4


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
