"""The slot that goes in each head at the end of a step, and all others: fixed shapes, nothing read back."""

from __future__ import annotations

from functools import cached_property

import torch
from kvpass.kernels.exits.weights import unit
from kvpass.kernels.rank.places import NUMBER
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor

BEYOND = 2**31 - 1
"""Behind every place."""


class Victims:
    """Of each head a slot that goes, or none. As `kvpass.kernels.exits.weights.Pairs`, of the slot that goes and each
    other: float32 [B, Hkv, C].

    Args:
        state: with the token, before any slot is free.
        used: bool [B, Hkv, C], which slots are in use.
        gone: likewise, which go.

    Attributes:
        kept: bool [B, Hkv, C], slots that stay, of heads in which one goes.
        going: bool [B, Hkv, 1], whether one goes.
        chosen: bool [B, Hkv, C], what it goes into, once that is known.
    """

    def __init__(self, state: State, slots: Slots, used: Tensor, gone: Tensor, rule: Rule) -> None:
        self.state, self.slots, self.used, self.gone = state, slots, used, gone
        self.going = slots.sum(gone) > 0
        self.kept = used & ~gone & slots.of(self.going)
        self.chosen = self.kept
        self.pos = state.pos
        self.place = state.stats[stat(rule, NUMBER)].int() if keeps(rule, NUMBER) else state.pos

    def own(self, x: Tensor) -> Tensor:
        """Of values [B, Hkv, C] >= 0 those of the slots that go: [B, Hkv, 1], 0 where none does."""
        return self.slots.amax(torch.where(self.gone, x, 0))

    def least(self, x: Tensor, some: Tensor) -> Tensor:
        """The least of ints [B, Hkv, C] among some slots: [B, Hkv, 1]."""
        return self.slots.amin(torch.where(some, x, BEYOND))

    def entries(self, half: str) -> Tensor:
        """float32 [B, Hkv, C, width], keys (`k`) or values (`v`), 0 in empty slots, whose contents are undefined."""
        return torch.where(self.used[..., None], self.state[half].float(), 0.0)

    def gone_entries(self, half: str) -> Tensor:
        """Those of the slots that go: float32 [B, Hkv, 1, width], 0 where none does."""
        return self.slots.mixed(self.gone.float()[:, :, None], self.entries(half))

    def per_slot(self, x: Tensor) -> Tensor:
        """Vectors of heads [B, Hkv, 1, width] as those of their slots, or what broadcasts to that."""
        return self.slots.of(x.mT).mT

    @cached_property
    def cosine(self) -> Tensor:
        return self.slots.products(unit(self.gone_entries("k")), unit(self.entries("k")))[:, :, 0]

    @cached_property
    def distance(self) -> Tensor:
        return (self.entries("k") - self.per_slot(self.gone_entries("k"))).square().sum(-1)

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        gone, kept = (torch.linalg.vector_norm(x, dim=-1) for x in (self.gone_entries("v"), self.entries("v")))
        return self.slots.of(gone), kept

    @property
    def targets(self) -> Tensor:
        return self.slots.of(self.slots.sum(self.chosen).clamp(min=1).float())
