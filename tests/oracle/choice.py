"""Choosing what to keep, and judging whether somebody else's choice is the same up to float32 rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

FLOAT32_TINY = 2.0**-126
"""Smallest normal float32. Float32 code may flush what lies below to zero, float64 code does not."""


@dataclass
class Choice:
    """What one (row, head) had to choose from at the end of one call."""

    positions: Array  # candidates, ascending
    score: Array  # [len(positions)]
    variance: Array  # same; only the order of these decides the scope
    power: Array  # same: sumsq / count, the magnitude from which the variance was subtracted
    protected: Array  # same, bool
    untouchable: int
    keep: int
    queries: int  # how many queries ever voted: each may have lost FLOAT32_TINY
    error: Array | None = None  # how far float32 may have moved each score; None: `rtol` of itself
    blurred: Array | None = None  # bool: float32 may see a rank or verdict otherwise, so equal scores are no tie

    def bounds(self, rtol: float) -> tuple[Array, Array]:
        """(lowest, highest) that float32 may have made of each score."""
        slack = (rtol * self.score if self.error is None else self.error) + self.queries * FLOAT32_TINY
        return self.score - slack, self.score + slack

    def in_scope(self) -> Array:
        """The `untouchable` slots: protected first, then the largest variance; ties go to the older."""
        first = [(not p, -var, pos) for p, var, pos in zip(self.protected, self.variance, self.positions, strict=True)]
        order = sorted(range(len(first)), key=first.__getitem__)
        mark = np.zeros(len(self.positions), dtype=bool)
        mark[order[: self.untouchable]] = True
        return mark

    def kept(self) -> Array:
        """Positions to keep, ascending: protected, untouchable, then the best scores; ties keep the older."""
        scope = self.in_scope()
        tier = np.where(self.protected, 0, np.where(scope, 1, 2))
        order = sorted(range(len(self.positions)), key=lambda i: (tier[i], -self.score[i], self.positions[i]))
        return np.sort(self.positions[order[: self.keep]])


def objection(choice: Choice, theirs: Array, rtol: float) -> str | None:
    """Why keeping `theirs` cannot be float32's view of this choice, or None if it can.

    A score is a sum of probabilities, all positive, so its error is relative to itself: two scores may come
    out in the other order if each moves by at most `rtol` of itself, plus what float32 flushes to zero. Scores of
    another kind come with an error of their own.
    A variance is a difference, so its error is relative to what it was subtracted from: a relative error r
    of the probabilities gives 2r in sumsq and in mean^2 <= sumsq/count, together 4r of `power`.
    """
    kept = np.isin(choice.positions, theirs)
    if kept.sum() != len(theirs) or len(np.unique(theirs)) != len(theirs):
        return f"it holds tokens that were not there to keep: {sorted(set(theirs) - set(choice.positions))}"
    if len(theirs) != choice.keep:
        return f"it keeps {len(theirs)} tokens, not {choice.keep}"
    lost = ~kept
    if (lost & choice.protected).any():
        return f"it evicts protected tokens {choice.positions[lost & choice.protected].tolist()}"
    if not lost.any():
        return None
    surely_out, surely_in = scope_bounds(choice, rtol)
    if (lost & surely_in).any():
        return f"it evicts untouchable tokens {choice.positions[lost & surely_in].tolist()}"
    return ranking_objection(choice, kept, surely_in, surely_out, rtol)


def scope_bounds(choice: Choice, rtol: float) -> tuple[Array, Array]:
    """(surely outside of the scope, surely in it), whatever float32 made of the variances."""
    none = np.zeros(len(choice.positions), dtype=bool)
    if choice.untouchable == 0:
        return ~none, none
    scope = choice.in_scope()
    free = scope & ~choice.protected
    if not free.any() or scope.all():
        return ~scope, scope
    slack = 4 * rtol * choice.power + FLOAT32_TINY
    lowest_in = (choice.variance - slack)[free].min()
    highest_out = (choice.variance + slack)[~scope].max()
    surely_out = ~scope & (choice.variance + slack < lowest_in)
    surely_in = choice.protected | (free & (choice.variance - slack > highest_out))
    return surely_out, surely_in


def ranking_objection(choice: Choice, kept: Array, surely_in: Array, surely_out: Array, rtol: float) -> str | None:
    """No token that they kept may rank clearly below one that they evicted, unless it can be in the scope."""
    score, positions = choice.score, choice.positions
    low, high = choice.bounds(rtol)
    worst = np.flatnonzero(~kept)[low[~kept].argmax()]
    beaten = kept & ~choice.protected & (high < low[worst])
    if (beaten & surely_out).any():
        i = np.flatnonzero(beaten & surely_out)[score[beaten & surely_out].argmin()]
        gap, explained = score[worst] - score[i], (score[worst] - low[worst]) + (high[i] - score[i])
        return (
            f"it evicts {positions[worst]} (score {score[worst]:.9g}) and keeps {positions[i]} "
            f"(score {score[i]:.9g}): gap {gap:.3g}, float32 explains {explained:.3g}"
        )
    doubtful = beaten & ~surely_in
    if doubtful.sum() > max(choice.untouchable - surely_in.sum(), 0):
        return f"the scope cannot hold all tokens that rank below the evicted ones: {positions[doubtful]}"
    return tie_objection(choice, kept, surely_out)


def tie_objection(choice: Choice, kept: Array, surely_out: Array) -> str | None:
    """Exactly equal float64 scores are copies of one value (max-pooling) or zeros: float32 sees the tie too."""
    open_ = surely_out & ~choice.protected
    if choice.blurred is not None:
        open_ = open_ & ~choice.blurred
    oldest_lost: dict[float, int] = {}
    for i in np.flatnonzero(~kept & open_):
        oldest_lost.setdefault(choice.score[i], choice.positions[i])
    for i in np.flatnonzero(kept & open_):
        if choice.positions[i] > oldest_lost.get(choice.score[i], np.iinfo(np.int64).max):
            older = oldest_lost[choice.score[i]]
            return f"tie at {choice.score[i]:.9g}: it keeps {choice.positions[i]}, evicts the older {older}"
    return None
