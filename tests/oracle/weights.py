"""Scores that are multiplied with a norm of the token's value."""

from __future__ import annotations

import numpy as np
from oracle.base import Memory, Policy, Sight

Array = np.ndarray


def l1(sight: Sight) -> Array:
    """[T] L1 norm of the values."""
    return np.abs(sight.values[sight.head]).sum(-1)


def vo_l1(sight: Sight, head: int | None = None) -> Array:
    """[T] L1 norm of value times output projection, mean over the query heads of the group."""
    head = sight.head if head is None else head
    group = len(sight.rows)
    assert sight.outward is not None, "the oracle was given no output projection"
    norms = [np.abs(sight.values[head] @ sight.outward[head * group + g]).sum(-1) for g in range(group)]
    return np.mean(norms, axis=0)


def vo_l1_share(sight: Sight) -> Array:
    """[T] the same, as a share of the sum over all KV heads of the layer."""
    return vo_l1(sight) / sum(vo_l1(sight, head) for head in range(len(sight.values)))


class Weighted(Policy):
    """A policy before this one in the bases, its score times a weight."""

    needs = True
    floor = 0.0

    def weigh(self, sight: Sight) -> Array:
        raise NotImplementedError

    def look(self, memory: Memory, sight: Sight) -> None:
        super().look(memory, sight)
        memory.weight = self.weigh(sight)

    def score(self, memory: Memory) -> Array:
        return (super().score(memory) + self.floor) * memory.weight

    def error(self, memory: Memory, rounding: float) -> Array:
        """Both factors may be off."""
        return 2 * rounding * self.score(memory)
