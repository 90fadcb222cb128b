"""By what slots rank, and the scores that stand above all others."""

from __future__ import annotations

from dataclasses import dataclass

from kvpass.kernels.rule import Record, one_of
from kvpass.kernels.slots.statistics import brought

SCORES = ("position", "sum", "mean", "important", "last")
"""Scores that positions and attention's statistics give by themselves; all other names are scorers'."""

SCORED = brought("scored")
"""A slot's statistic that is no sum over queries: the score that a scorer gave it, in its last multi-token call or when
it arrived.
"""

INF = float("inf")

UNTOUCHABLE = 3.0e38
"""Score of a slot that the scope keeps out of reach: above every real score, below a protected slot's +inf."""

DEMOTED = -UNTOUCHABLE
"""Score of a slot whose token is held in fewer bits, and for good: below every real score, above none."""


@dataclass(frozen=True)
class Ranking(Record):
    """score: one of `SCORES`, or `scored`, what a scorer gave. heads: whether `each` KV head ranks its own slots, or
    `all` of a layer share the mean.
    """

    score: str = "position"
    heads: str = "each"

    def check(self) -> None:
        one_of(self, "heads", "each", "all")

    @property
    def together(self) -> bool:
        """Whether attention's statistics are ranked by their mean over the heads."""
        return self.heads == "all" and self.score not in ("position", SCORED)

    @property
    def joins(self) -> bool:
        return self.heads == "all" and self.score != "position"


@dataclass(frozen=True)
class Scope(Record):
    """A share of the budget, and one slot more, whose deviations are largest, are out of reach (RoCo,
    arXiv 2402.06262).
    """

    scope_num: int = 0
    scope_den: int = 1
