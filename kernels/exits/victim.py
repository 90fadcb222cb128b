"""The slot that goes in each head at the end of a step, and all others: fixed shapes, nothing read back."""

from __future__ import annotations

from functools import cached_property

import torch
from kvpass.kernels.exits.weights import Pairs, unit
from kvpass.kernels.rank.places import NUMBER
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor

BEYOND = 2**31 - 1
"""Behind every place."""


class Victims:
    """Of each head a slot that goes, or none.

    Args:
        state: with the token, before any slot is free.
        used: bool [B, Hkv, C], which slots are in use.
        gone: likewise, which go.

    Attributes:
        kept: bool [B, Hkv, C], slots that stay, of heads in which one goes.
        going: bool [B, Hkv, 1], whether one goes.
        place: int [B, Hkv, C], where slots are among their row's tokens.
        at: int64 [B, Hkv, 1], which slot of the head goes, 0 if none does.
    """

    def __init__(self, state: State, slots: Slots, used: Tensor, gone: Tensor, rule: Rule) -> None:
        self.state, self.slots, self.used = state, slots, used
        self.going = slots.sum(gone) > 0
        self.kept = used & ~gone & slots.of(self.going)
        self.pos = state.pos
        self.place = state.stats[stat(rule, NUMBER)].int() if keeps(rule, NUMBER) else state.pos
        self.at = slots.amax(torch.where(gone, slots.offset, 0))

    def least(self, x: Tensor, some: Tensor) -> Tensor:
        """The least of ints [B, Hkv, C] among some slots: [B, Hkv, 1]."""
        return self.slots.amin(torch.where(some, x, BEYOND))

    def only(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """Which slot of its head, int64 [B, Hkv, 1], of slots [B, Hkv, C] of which each head has one or none, and
        whether it has one.
        """
        return self.slots.amax(torch.where(some, self.slots.offset, 0)), self.slots.sum(some) > 0

    def flat_places(self, at: Tensor) -> Tensor:
        """int64 [B * Hkv * m] of the flattened memory, of slots [B, Hkv, m] of the heads."""
        return (self.slots.first[..., None] + at).flatten()

    def cells(self, x: Tensor, at: Tensor) -> Tensor:
        """Of values [B, Hkv, C] those of some slots, [B, Hkv, m]: undefined where a slot is empty."""
        found: Tensor = x.reshape(-1)[self.flat_places(at)].view(at.shape)
        return found

    def entries(self, half: str, at: Tensor) -> Tensor:
        """Their keys (`k`) or values (`v`): float32 [B, Hkv, m, width], undefined likewise."""
        x = self.state[half]
        found: Tensor = x.reshape(-1, x.shape[3])[self.flat_places(at)].view(*at.shape, -1)
        return found.float()

    @cached_property
    def cosine(self) -> Tensor:
        """Of the key that goes and each other: float32 [B, Hkv, C], undefined where a slot is empty or none goes."""
        keys = self.state.k
        dots = self.slots.products(unit(self.entries("k", self.at)), keys)[:, :, 0]
        length: Tensor = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
        return dots / length.clamp(min=1e-6)


class Targets(Pairs):
    """Slots [B, Hkv, m] that what goes comes into: as `kvpass.kernels.exits.weights.Pairs`, of that shape.

    Attributes:
        at: int64, which slot of its head; where there is none, that which goes.
        there: bool, whether there is one.
    """

    def __init__(self, victims: Victims, at: Tensor, there: Tensor) -> None:
        self.victims, self.there = victims, there & victims.going
        self.at = torch.where(self.there, at, victims.at)

    def where(self, some: Tensor) -> Targets:
        """Those of the slots."""
        return Targets(self.victims, self.at, self.there & some)

    def gone(self, half: str) -> Tensor:
        """float32 [B, Hkv, 1, width], what goes."""
        return self.victims.entries(half, self.victims.at)

    def kept(self, half: str) -> Tensor:
        """float32 [B, Hkv, m, width], what it comes into."""
        return self.victims.entries(half, self.at)

    @cached_property
    def targets(self) -> Tensor:
        return self.there.sum(-1, keepdim=True).clamp(min=1).float()
