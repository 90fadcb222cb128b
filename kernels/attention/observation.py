"""What attention observes of the queries of a call, for each key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvpass.kernels.rule import Record, Rule, one_of
from kvpass.kernels.slots.statistics import Statistics

STATISTICS = ("sum", "sumsq", "count", "important", "last")
"""What attention can emit for each key: sums of the observed probabilities, of their squares, of the queries that see
the key, and of those that give it at least an even share (1 / keys visible to the query); and one more than the
position of the newest of those, 0 if there is none. Slots keep its number among the row's valid tokens instead.
"""

EVEN = 1 - 2.0**-16
"""How much of an even share counts as one: the only key that a query sees gets 1, or for rounding a little less."""


@dataclass(frozen=True)
class Observation(Record):
    """Which queries are observed, and what is made of them.

    Attributes:
        emits: statistics that a call of several tokens computes; empty: those of `STATISTICS` that slots keep.
        queries: the last n of a call of several tokens; -1: all.
        group: how the query heads of a KV head are reduced, row by row: `mean` or `max`.
        carry: whether such a call adds to what slots have.
        decode: whether a call of one token does `add` its row, `replace` what slots have by it, or `none`.
    """

    emits: tuple[str, ...] = ()
    queries: int = 0
    group: str = "mean"
    carry: bool = True
    decode: str = "none"

    def check(self) -> None:
        one_of(self, "group", "mean", "max")
        one_of(self, "decode", "none", "add", "replace")

    def work(self, rule: Rule) -> Iterator[str]:
        if self.queries and emitted(rule):
            yield self.rows

    @property
    def rows(self) -> str:
        """How much of attention's matrix is looked at again, for people."""
        return "T*T" if self.queries < 0 else f"{self.queries}*T"

    @property
    def window(self) -> int:
        """Queries of the observation window, 0 if all are observed or none."""
        return max(self.queries, 0)


def emitted(rule: Rule) -> tuple[str, ...]:
    """The statistics that a multi-token call computes, in order."""
    found: tuple[str, ...] | None = rule.derived.get(emitted)
    if found is None:
        found = rule[Observation].emits or tuple(name for name in rule[Statistics].stats if name in STATISTICS)
        rule.derived[emitted] = found
    return found


def emission(rule: Rule, name: str) -> int:
    """Row of what a multi-token call emits that holds the named statistic, -1 if it is not emitted."""
    return emitted(rule).index(name) if name in emitted(rule) else -1
