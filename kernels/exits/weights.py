"""How much of what goes comes into a slot that stays, whose own weight is 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rule import Rule
from torch import Tensor

EPSILON = 1e-6
"""What kvpress adds to norms that it divides by."""


class Pairs(ABC):
    """Slots that go, each with a slot that it goes into: float32 tensors of one shape, or what broadcasts to it."""

    @abstractmethod
    def gone(self, half: str) -> Tensor:
        """float32 [.., width], keys (`k`) or values (`v`) that go."""

    @abstractmethod
    def kept(self, half: str) -> Tensor:
        """The same of what they go into."""

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """How many slots what goes is shared out over."""

    @cached_property
    def cosine(self) -> Tensor:
        """Of both keys."""
        return cosines(self.gone("k"), self.kept("k"))

    @cached_property
    def distance(self) -> Tensor:
        """Of both keys, squared."""
        return (self.gone("k") - self.kept("k")).square().sum(-1)

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Of the value that goes, and of the one that stays."""
        gone, kept = (torch.linalg.vector_norm(x, dim=-1) for x in (self.gone("v"), self.kept("v")))
        return gone, kept


def weights(pairs: Pairs, rule: Rule) -> Tensor:
    """float32 >= 0, as the pairs."""
    return _WEIGHTS[rule[Merge].merge_weight](pairs, rule)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of float32 vectors [.., D]: [..]."""
    return (unit(one) * unit(other)).sum(-1)


def unit(x: Tensor) -> Tensor:
    """Vectors [.., D] of length 1; of length 0 they stay as they are."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=EPSILON)


def _even(pairs: Pairs, rule: Rule) -> Tensor:
    """Shared out over the targets evenly (CaM, ICML 2024: 1 / m)."""
    return 1.0 / pairs.targets


def _cosine(pairs: Pairs, rule: Rule) -> Tensor:
    """Of the keys (D2O, arXiv 2406.13035)."""
    return pairs.cosine.clamp(min=0)


def _cosine_norm(pairs: Pairs, rule: Rule) -> Tensor:
    """The same times the share of the value that goes in the norms of both values (kvpress' MergingPress)."""
    gone, kept = pairs.norms
    return pairs.cosine.clamp(min=0) * gone / (gone + kept + EPSILON)


def _gaussian(pairs: Pairs, rule: Rule) -> Tensor:
    """exp(-distance^2 / (2 sigma^2)) of the keys (KVMerger, arXiv 2407.08454)."""
    return torch.exp(pairs.distance / (-2 * rule[Merge].merge_sigma ** 2))


_WEIGHTS: dict[str, Callable[[Pairs, Rule], Tensor]] = {
    "even": _even,
    "cosine": _cosine,
    "cosine_norm": _cosine_norm,
    "gaussian": _gaussian,
}
