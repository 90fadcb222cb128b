"""Policies without a budget of their own: a head keeps what passes a threshold, at most its budget."""

from __future__ import annotations

import numpy as np
from oracle.base import ROUNDING, Memory, Policy, Row, Sight
from oracle.held import Held, clear

Array = np.ndarray


class NoneGoodEnough(Held):
    """Keys of negative length: every one is below the threshold, and the best stays all the same."""

    pointwise = True
    spread = "threshold"
    cut = 0.0

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        norm = np.sqrt((sight.keys[sight.candidates] ** 2).sum(-1))
        return clear(-norm, sight.rounding * norm)


class CORM(Policy):
    """A token goes when the last `window` queries all gave it less than an even share, in every head of the group."""

    needs = True
    spread = "threshold"
    cut = -255
    recent = 256

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[int, int] = {}  # of the row that a memory belongs to

    def look(self, memory: Memory, sight: Sight) -> None:
        for i in np.flatnonzero(sight.row.valid):
            most, seen = sight.rows[:, i].max(0), sight.sees[i]
            even = 1 / max(seen.sum(), 1)
            newest = sight.row.queries[i] + 1
            memory.last[seen & (most >= even)] = newest
            memory.sum[seen & (most >= even * (1 - ROUNDING))] = newest  # what float32 may find, generously
            memory.sumsq[seen & (most >= even * (1 + ROUNDING))] = newest  # and sternly
        self.ends[id(memory)] = sight.row.end

    def score(self, memory: Memory) -> Array:
        return memory.last - self.ends[id(memory)]

    def error(self, memory: Memory, rounding: float) -> Array | None:
        return np.maximum(memory.sum - memory.last, memory.last - memory.sumsq)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - min(self.recent, n // 2)


class SimLayerKV(Held):
    """A layer whose last query looks at the first 4 and the last 1,024 tokens alone keeps no others."""

    window = 1
    spread = "threshold"
    cut = 0.5
    sinks = 4
    recent = 1024
    most = 0.9

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, row = sight.candidates, sight.row
        return clear(1 + (c - row.first) / (row.end - row.first), np.full(len(c), 2.0**-22))

    def together(self, memories: list[Memory], sights: list[Sight]) -> None:
        near = []
        for sight in sights:
            positions = np.arange(sight.rows.shape[2])
            close = (positions < sight.row.first + self.sinks) | (positions >= sight.row.end - self.recent)
            near.append(sight.rows[:, sight.voters(1)[-1]][:, close].sum(-1).mean())
        if np.mean(near) > self.most:
            for memory, sight in zip(memories, sights, strict=True):
                before = sight.candidates[sight.outside(1)]
                memory.held[before] = 0

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + self.sinks) | (positions >= row.end - min(self.recent, (n - self.sinks) // 2))


class FastGen(Held):
    """Each head keeps the first set that recovers 90 % of what the last 400 queries looked at."""

    spread = "threshold"
    cut = 0.5
    voting = 400
    recovered, hitters, recent = 0.9, 0.3, 0.3

    def measure(self, sight: Sight) -> tuple[Array, Array, Array]:
        c, row = sight.candidates, sight.row
        mass = sight.rows[:, sight.voters(self.voting)].mean((0, 1))[c]
        best = sorted(range(len(c)), key=lambda i: (-mass[i], c[i]))[: int(np.float32(self.hitters) * len(c))]
        chosen = c < row.first + 4
        for more in ([], best, np.flatnonzero(c >= row.end - int(np.float32(self.recent) * len(c))), range(len(c))):
            chosen[list(more)] = True
            if mass[chosen].sum() >= self.recovered * mass.sum():
                break
        return clear(np.where(chosen, 1 + mass, mass - 1), sight.rounding * mass + 2.0**-22)

    def look(self, memory: Memory, sight: Sight) -> None:
        super().look(memory, sight)
        if sight.multi:  # the window is kept whole, but only one token of it is protected
            self.leave_out(memory, sight.candidates[sight.candidates >= sight.row.end - 1])

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + 4) | (positions >= row.end - 1)
