"""What each policy means, for one KV head of one row, in float64 and plain Python.

Written from shared/policies.md (sections 0, 1.1, 1.2, 1.4, 1.5, 2.1) and from the definitions of
docs/design/0001, never from kvpass' code. A policy looks at `rows`: for each query of a call the
probabilities over all tokens of the sequence, already averaged over the query heads that share this KV
head, exactly zero where the query may not look or the token was evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Budget:
    """Tokens a KV head may keep after `seen` valid tokens: a number of slots, or a fraction with a floor."""

    slots: int | None = None
    fraction: Fraction = Fraction(1)
    floor: int = 64

    @staticmethod
    def of(budget: float | int, floor: int = 64) -> Budget:
        """The two spellings of the library's `budget=`: int = slots, float = fraction of the tokens seen."""
        if isinstance(budget, int):
            return Budget(slots=budget)
        return Budget(fraction=Fraction(str(budget)), floor=floor)

    def __call__(self, seen: int) -> int:
        if self.slots is not None:
            return self.slots
        return max(self.floor, seen * self.fraction.numerator // self.fraction.denominator)


@dataclass
class Row:
    """One row of the batch during one call. Positions count padding."""

    start: int  # position of the call's first token
    valid: Array  # [S] bool: the call's tokens that are not padding
    first: int  # position of the row's first valid token
    end: int  # one past the row's last valid token
    seen: int  # valid tokens seen so far, this call included

    @property
    def queries(self) -> Array:
        """Positions of the call's queries."""
        return self.start + np.arange(len(self.valid))


class Memory:
    """The statistics of one KV head, per token of the sequence (nobody reads those of evicted tokens)."""

    def __init__(self) -> None:
        self.sum = np.zeros(0)
        self.sumsq = np.zeros(0)
        self.count = np.zeros(0)

    def grow(self, length: int) -> None:
        """Room for tokens up to `length`; new tokens start at zero."""
        for name in ("sum", "sumsq", "count"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(length - len(old))]))

    def mean(self) -> Array:
        return self.sum / np.maximum(self.count, 1)

    def variance(self) -> Array:
        """Of the observed probabilities. Never below zero, where rounding would put a constant's."""
        return np.maximum(self.sumsq / np.maximum(self.count, 1) - self.mean() ** 2, 0)


class Policy:
    """Keeps everything. The base of the others."""

    shared = False  # True: one choice for all KV heads of a layer, ranked by their average score
    scoped = False  # True: the slots of largest standard deviation cannot be evicted

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        """Update the statistics. rows, sees: [S, T]; candidates: the tokens that compete, ascending."""

    def score(self, memory: Memory) -> Array:
        """[T], higher = keep."""
        return np.zeros(len(memory.sum))

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        """Which of these positions may not be evicted."""
        return np.zeros(len(positions), dtype=bool)

    def untouchable(self, n: int) -> int:
        """How many slots the scope keeps out of reach."""
        return 0


class Full(Policy):
    pass


class StreamingLLM(Policy):
    """The first 4 tokens and as many of the latest as fit."""

    def score(self, memory: Memory) -> Array:
        return np.arange(len(memory.sum), dtype=float)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions < row.first + 4


class H2O(Policy):
    """Sum of the probabilities from all queries so far; half of the budget goes to the latest tokens."""

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        memory.sum = memory.sum + rows[row.valid].sum(0)

    def score(self, memory: Memory) -> Array:
        return memory.sum

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - n // 2


class Tova(Policy):
    """The newest query's probabilities, averaged over all heads of the layer. Nothing is protected."""

    shared = True

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        if row.valid.any():
            memory.sum = rows[np.flatnonzero(row.valid)[-1]].copy()

    def score(self, memory: Memory) -> Array:
        return memory.sum


class SnapKV(Policy):
    """The last 32 queries of a call vote, max-pooled over 7 neighbours; later single tokens add their vote."""

    window = 32
    pool = 7

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        if len(row.valid) == 1:
            if row.valid[0]:
                memory.sum = memory.sum + rows[0]
                memory.count = memory.count + sees[0]
            return
        voters = row.valid & (row.queries >= row.end - self.window)
        memory.sum, memory.count = rows[voters].sum(0), sees[voters].sum(0).astype(float)
        memory.sum[candidates] = self.pooled(memory.sum[candidates], candidates < row.end - self.window)

    def pooled(self, values: Array, outside: Array) -> Array:
        """Max over 7 neighbours outside the window; tokens of the window keep theirs and lend nothing."""
        half, lent = self.pool // 2, np.where(outside, values, 0)
        padded = np.concatenate([np.zeros(half), lent, np.zeros(half)])
        best = [padded[i : i + self.pool].max() for i in range(len(values))]
        return np.where(outside, best, values)

    def score(self, memory: Memory) -> Array:
        return memory.mean()

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return positions >= row.end - self.window


class RoCo(Policy):
    """Mean of the probabilities; the slots whose probabilities vary most are out of reach."""

    scoped = True

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        memory.sum = memory.sum + rows[row.valid].sum(0)
        memory.sumsq = memory.sumsq + (rows[row.valid] ** 2).sum(0)
        memory.count = memory.count + sees[row.valid].sum(0)

    def score(self, memory: Memory) -> Array:
        return memory.mean()

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return (positions < row.first + 4) | (positions >= row.end - 10)

    def untouchable(self, n: int) -> int:
        return n * 3 // 10 + 1


POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "roco": RoCo,
}
EVICTING = [name for name in POLICIES if name != "full"]
