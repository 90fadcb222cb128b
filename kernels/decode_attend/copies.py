"""Whole copies of some heads' slots in a step on the CPU: products with copies in the place of products with codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.codecs.whole import counted, listed
from kvpass.kernels.decode_attend.step import HeadRange, StepFacts
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.lookup import slots_at
from kvpass.kernels.slots.state import State
from torch import Tensor


class Copies(ABC):
    """Which slots have a copy, and where it is."""

    @abstractmethod
    def put(self, own: Tensor, logits: Tensor) -> None:
        """Logits of copies float32 [heads, G, W] in the place of those of codes [heads, G, n], in place."""

    @abstractmethod
    def take(self, weights: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights float32 [heads, G, n] of slots as those of codes, 0 where there is a copy, and of copies [heads, G,
        width]; and which copies there are, bool [heads, width], None if all are or the others hold zeros: what has gone
        may be infinite, and 0 times that is no number.
        """


def copies_of(state: State, heads: HeadRange, facts: StepFacts, rule: Rule) -> Copies | None:
    """Of some heads' used slots; None where nothing is held whole beside codes."""
    if not coded(rule) or not rule[Storage].copies:
        return None
    at, pos = state[WHOLE_AT].flatten(0, 1)[heads.first : heads.last], heads.cells(state.pos)
    if rule[Storage].by_score:
        return Placed.of(at, pos)
    if isinstance(facts.first, int) and not facts.parted:
        return Listed(*counted(pos, facts.first, facts.position, rule))
    return Listed(*listed(at, pos, rule))


@dataclass(frozen=True)
class Listed(Copies):
    """A few of them, one by one: head, slot and place, int64 [copies] each."""

    head: Tensor
    slot: Tensor
    place: Tensor

    def put(self, own: Tensor, logits: Tensor) -> None:
        logits[self.head, :, self.slot] = own[self.head, :, self.place]

    def take(self, weights: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        own = weights.new_zeros(*weights.shape[:2], width)
        own[self.head, :, self.place] = weights[self.head, :, self.slot]
        weights = weights.clone()
        weights[self.head, :, self.slot] = 0.0
        if len(self.place) == own.shape[0] * width:
            return weights, own, None
        there = own.new_zeros(len(own), width, dtype=torch.bool)
        there[self.head, self.place] = True
        return weights, own, there


@dataclass(frozen=True)
class Placed(Copies):
    """Many, place by place, int64 [heads, 1, W]: the slot of each, and the place itself; of an empty place those of the
    newest token. used: float32 [heads, 1, W], 0 of an empty one.
    """

    slot: Tensor
    place: Tensor
    used: Tensor

    @staticmethod
    def of(at: Tensor, pos: Tensor) -> Placed:
        """at: what places hold, int32 [heads, W]; pos: int32 [heads, n], rising, of slots in use, the last of which is
        the step's own token.
        """
        newest, used = pos[:, -1:], at >= 0
        own = (at == newest).int().argmax(-1, keepdim=True)
        place = torch.where(used, torch.arange(at.shape[1], device=at.device), own)
        slot = slots_at(torch.where(used, at, newest), pos)
        return Placed(slot[:, None], place[:, None], used.float()[:, None])

    def put(self, own: Tensor, logits: Tensor) -> None:
        logits.scatter_(2, self.slot.expand_as(own), own.gather(2, self.place.expand_as(own)))

    def take(self, weights: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        slot = self.slot.expand(*weights.shape[:2], width)
        return weights.scatter(2, slot, 0.0), weights.gather(2, slot) * self.used, None
