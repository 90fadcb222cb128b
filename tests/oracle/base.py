"""What every policy of the oracle shares: budgets, rows, the memory of a KV head, and the questions it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Array = np.ndarray

ROUNDING = 2.0**-14
"""How far float32 may move a score, relative to its size: 1024 units in the last place.

The relative error of a probability is the absolute error of its logit, a dot product of projections of
hidden states that carry the rounding of all layers before. `test_oracle_rounding` measures it on SmolLM2,
float32 against float64: at most 3.4e-5 for one query's probabilities, 1.8e-5 for sums over queries.
"""


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
    """One row of the batch during one call. Its real tokens are numbered from 0; padding has no number."""

    start: int  # position of the call's first token, padding counted
    valid: Array  # [S] bool: the call's tokens that are not padding
    before: int  # real tokens seen before this call
    seen: int  # real tokens seen so far, this call included
    first = 0  # number of the row's first token

    @property
    def end(self) -> int:
        """One past the number of the row's last token."""
        return self.seen

    @property
    def queries(self) -> Array:
        """Numbers of the call's queries; those of padding mean nothing."""
        return self.before + np.cumsum(self.valid) - 1


class Memory:
    """The statistics of one KV head, per token of the sequence (nobody reads those of evicted tokens)."""

    def __init__(self) -> None:
        self.sum = np.zeros(0)
        self.sumsq = np.zeros(0)
        self.count = np.zeros(0)
        self.important = np.zeros(0)  # queries that gave the token an even share
        self.held = np.zeros(0)  # score that was given once
        self.error = np.zeros(0)  # how far float32 may have moved `held`, or a count of verdicts
        self.blurred = np.zeros(0)  # 1: a rank or a verdict that float32 may see otherwise
        self.weight = np.zeros(0)  # what multiplies the score
        self.last = np.zeros(0)  # newest query that gave the token an even share

    def grow(self, length: int) -> None:
        """Room for tokens up to `length`; new tokens start at zero."""
        for name, old in vars(self).items():
            setattr(self, name, np.concatenate([old, np.zeros(length - len(old))]))

    def mean(self) -> Array:
        return self.sum / np.maximum(self.count, 1)

    def variance(self) -> Array:
        """Of the observed probabilities. Never below zero, where rounding would put a constant's."""
        return np.maximum(self.sumsq / np.maximum(self.count, 1) - self.mean() ** 2, 0)


@dataclass
class Sight:
    """All that one KV head of one row could look at in one call. T: the row's real tokens, by number."""

    rows: Array  # [G, S, T] probabilities of each query head of the group
    logits: Array  # [G, S, T]
    sees: Array  # [S, T] bool: for any query head of the group
    keys: Array  # [T, D]
    values: Array  # [Hkv, T, Dv] of all KV heads
    outward: Array | None  # [Hq, Dv, hidden]: what each query head's output is multiplied with
    candidates: Array  # numbers of the tokens that compete, ascending
    row: Row
    layer: int
    head: int
    n: int  # the even budget
    rounding: float
    due: bool = False  # a step at which what waited goes

    @property
    def multi(self) -> bool:
        return len(self.row.valid) > 1

    def voters(self, window: int) -> Array:
        """Indices of the last `window` valid queries of the call."""
        return np.flatnonzero(self.row.valid & (self.row.queries >= self.row.end - window))

    def outside(self, window: int) -> Array:
        """Which candidates come before the last `window` tokens."""
        return self.candidates < self.row.end - window


class Policy:
    """Keeps everything. The base of the others."""

    shared = False  # True: one choice for all KV heads of a layer, ranked by their average score
    scoped = False  # True: some slots cannot be evicted, whatever their score
    needs = False  # True: looks at keys, values or logits, so a simulator must be given them
    safeguard: Fraction | None = None  # not None: the heads of a layer share one budget, this share is safe in each
    steady = True  # the budget is a number of slots, not a fraction
    spread = ""  # what shares slots out once a call of several tokens has passed all layers (oracle.spread)
    table: Array | None = None  # [layers, Hkv] shares of what a layer's budget leaves beside the protected slots
    rings = 0  # not 0: slots are this many rings (oracle.rings)
    reindexed = False  # True: kept keys are turned to their places among the kept tokens
    when = "always"  # "calls": generated tokens drive nothing out; "first": only the first call evicts
    every = 1  # so many generated tokens come before what is too much goes
    shortest = 1  # a later call that brings a row fewer tokens is as if these had been generated
    cut = -np.inf  # slots whose score is below it go, whatever the budget

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

    def scope_key(self, memory: Memory) -> tuple[Array, Array]:
        """(what the untouchable slots have most of, the size of its float32 error over 4 roundings)."""
        return memory.variance(), memory.sumsq / np.maximum(memory.count, 1)

    def error(self, memory: Memory, rounding: float) -> Array | None:
        """How far float32 may move each score; None: `rounding` of the score itself."""
        return None

    def look(self, memory: Memory, sight: Sight) -> None:
        """Update what does not follow from the mean probabilities alone. After `observe`."""

    def together(self, memories: list[Memory], sights: list[Sight]) -> None:
        """What the heads of a layer decide together at the end of a call of several tokens."""

    def prefer(self, sights: list[Sight]) -> float:
        """What a layer deserves next to others, from the latest sights of its heads; only for `spread = "preference"`,
        which comes with its own."""
        raise NotImplementedError

    def budget(self, even: int, seen: int, layer: int, layers: int) -> int:
        """Slots per head of the layer-th of `layers` layers, where an even budget is `even`."""
        return even
