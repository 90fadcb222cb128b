"""Reductions over the slots of each head, of even and of ragged states alike: fixed shapes, nothing read back.

Values of slots are [B, Hkv, C] or, by query head, [B, Hkv, G, C]; those of heads [B, Hkv, 1] or [B, Hkv, G, 1]. In a
ragged state place (b, h, c) is one of the flattened memory, whichever head owns it.
"""

from __future__ import annotations

import torch
from kvpass.kernels.slots.ragged import is_ragged, starts
from torch import Tensor


class Slots:
    """Which head each place of a state belongs to.

    Args:
        cursor: int32 [B, Hkv, 4 or 6].
        slots: C.

    Attributes:
        offset: int64 [1 or B, 1 or Hkv, C], of a place in its head's slots.
        width: places of a head: an int, or int64 [B, Hkv, 1].
        first: int64 [B, Hkv], the place of its slot 0.
    """

    def __init__(self, cursor: Tensor, slots: int) -> None:
        self.shape, self.ragged = (*cursor.shape[:2], slots), is_ragged(cursor)
        self.first = starts(cursor, slots)
        batch, heads = cursor.shape[:2]
        self._row = torch.arange(batch, device=cursor.device).view(-1, 1, 1)
        self._head = torch.arange(heads, device=cursor.device).view(1, -1, 1)
        self.offset = torch.arange(slots, device=cursor.device).view(1, 1, -1)
        self.width: int | Tensor = slots
        if self.ragged:
            place = torch.arange(batch * heads * slots, device=cursor.device)
            begin = self.first.flatten()
            self._owner = torch.searchsorted(begin, place, right=True) - 1
            self.offset = (place - begin[self._owner]).view(self.shape)
            owner = self._owner.view(self.shape)
            self._row, self._head = owner // heads, owner % heads
            ends = torch.cat([begin[1:], begin.new_full((1,), len(place))])
            self.width = (ends - begin).view(batch, heads, 1)

    def of(self, x: Tensor) -> Tensor:
        """The value of its head for each slot, or what broadcasts to that."""
        if not self.ragged:
            return x
        x = x.expand(*self.shape[:2], *x.shape[2:])
        picked = x.reshape(self.shape[0] * self.shape[1], -1)[self._owner]
        return picked[:, 0].view(self.shape) if x.dim() == 3 else picked.view(*self.shape, -1).movedim(-1, 2)

    def looked_up(self, table: Tensor, column: Tensor) -> Tensor:
        """table [1 or B, 1 or Hkv, g, T] at the owners' rows and columns int [B, Hkv, C]: [B, Hkv, g, C]."""
        table = table.expand(*self.shape[:2], *table.shape[2:])
        return table[self._row, self._head, :, column].movedim(-1, 2)

    def owned(self, table: Tensor) -> Tensor:
        """What belongs to heads, [B, Hkv, n], for each slot: [B, Hkv, 1 or C, n]."""
        return table[self._row, self._head] if self.ragged else table[:, :, None]

    def picked(self, table: Tensor, at: Tensor) -> Tensor:
        """Of what belongs to heads, [B, Hkv, n, ..], entry `at`, int64 [B, Hkv, C], for each slot: [B, Hkv, C, ..]."""
        return table[self._row, self._head, at]

    def _reduced(self, x: Tensor, how: str, start: float) -> Tensor:
        out = x.new_full((self.shape[0] * self.shape[1], x.numel() // self._owner.numel()), start)
        flat = x.flatten(0, 1).unsqueeze(1) if x.dim() == 3 else x.flatten(0, 1)  # [B * Hkv, G or 1, C]
        flat = flat.movedim(1, -1).reshape(-1, out.shape[1])
        out.scatter_reduce_(0, self._owner[:, None].expand_as(flat), flat, how)
        return out.view(*self.shape[:2], *([-1, 1] if x.dim() == 4 else [1]))

    def amax(self, x: Tensor) -> Tensor:
        """The largest of each head."""
        return self._reduced(x, "amax", _least(x)) if self.ragged else x.amax(-1, keepdim=True)

    def amin(self, x: Tensor) -> Tensor:
        """The smallest."""
        return -self.amax(-x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum; of bools int64."""
        x = x.long() if x.dtype == torch.bool else x
        return self._reduced(x, "sum", 0) if self.ragged else x.sum(-1, keepdim=True)

    def ranked(self, x: Tensor, rank: Tensor, *, descending: bool = False) -> Tensor:
        """Of the values x [B, Hkv, C] of a head in order, number `rank`, int [B, Hkv, 1], from 0: [B, Hkv, 1]."""
        if not self.ragged:
            return x.sort(-1, descending=descending).values.gather(-1, rank.clamp(0, self.shape[2] - 1).long())
        order = x.flatten().argsort(descending=descending, stable=True)
        order = order[self._owner[order].argsort(stable=True)]
        at = self.first[..., None] + torch.minimum(rank.clamp(min=0), self._last()).long()
        return x.flatten()[order][at]

    def _last(self) -> Tensor:
        assert isinstance(self.width, Tensor)
        return self.width - 1

    def products(self, queries: Tensor, k: Tensor) -> Tensor:
        """queries float32 [B, Hkv, G, D] times keys [B, Hkv, C, D]: float32 [B, Hkv, G, C]."""
        if not self.ragged:
            return queries @ k.float().mT
        keys, rows = k.reshape(-1, k.shape[-1]).float(), queries.flatten(0, 1)
        columns = [(keys * rows[:, g][self._owner]).sum(-1).view(self.shape) for g in range(rows.shape[1])]
        return torch.stack(columns, 2)

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        """weights float32 [B, Hkv, G, C] times values float32 [B, Hkv, C, Dv]: [B, Hkv, G, Dv]."""
        if not self.ragged:
            return weights @ v
        values = v.reshape(-1, v.shape[-1])
        out = values.new_zeros(self.shape[0] * self.shape[1], weights.shape[2], values.shape[1])
        for g in range(weights.shape[2]):
            out[:, g].index_add_(0, self._owner, weights[:, :, g].reshape(-1, 1) * values)
        return out.view(*self.shape[:2], *out.shape[1:])


def _least(x: Tensor) -> float:
    return float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
