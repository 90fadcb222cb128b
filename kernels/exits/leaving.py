"""What goes and what stays of one head in a call of several tokens, and pairs of both."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from kvpass.kernels.exits.weights import Pairs
from kvpass.kernels.rank.places import NUMBER
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor


class Leaving(NamedTuple):
    """One head's L keys."""

    k: Tensor
    """[L, D]"""
    v: Tensor
    """[L, Dv]"""
    score: Tensor
    """float32 [L], as of `score_slots`."""
    stats: Tensor
    """float32 [N, L]"""
    gone: Tensor
    """int64 [E], which keys go, ascending."""
    kept: Tensor
    """int64 [n], which stay, ascending: key kept[i] is in slot i."""
    place: Tensor
    """[L], where keys are among their row's tokens, ascending."""
    head: int

    @property
    def gone_keys(self) -> Tensor:
        """float32 [E, D]"""
        return self.k[self.gone].float()

    @property
    def kept_keys(self) -> Tensor:
        """float32 [n, D]"""
        return self.k[self.kept].float()

    @property
    def gone_places(self) -> Tensor:
        """[E]"""
        return self.place[self.gone]

    @property
    def kept_places(self) -> Tensor:
        """[n]"""
        return self.place[self.kept]


def places_of(stats: Tensor, rule: Rule) -> Tensor:
    """Where the keys of a head are among its row's tokens: by the number if slots keep it. stats: [N, L]."""
    if keeps(rule, NUMBER):
        return stats[stat(rule, NUMBER)].long()
    return torch.arange(stats.shape[1], device=stats.device)


class Couples(Pairs):
    """Slots that go, source int64 [P] of E, each with one that it goes into, target int64 [P] of n: as
    `kvpass.kernels.exits.weights.Pairs`, all [P].
    """

    def __init__(self, head: Leaving, source: Tensor, target: Tensor) -> None:
        self.head, self.source, self.target = head, source, target

    def where(self, some: Tensor) -> Couples:
        """Those of the pairs."""
        return Couples(self.head, self.source[some], self.target[some])

    def gone(self, half: str) -> Tensor:
        return self._entries(half, self.head.gone[self.source])

    def kept(self, half: str) -> Tensor:
        return self._entries(half, self.head.kept[self.target])

    def _entries(self, half: str, keys: Tensor) -> Tensor:
        x = self.head.k if half == "k" else self.head.v
        return x[keys].float()

    @cached_property
    def targets(self) -> Tensor:
        return torch.bincount(self.source, minlength=len(self.head.gone))[self.source].float()
