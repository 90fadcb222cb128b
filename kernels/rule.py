"""Rule: what an op observes and how it picks victims, as plain numbers.

The tensor-level form of a planned policy (docs/design/0001-state-and-kernels.md). It knows no policy names, no graphs
and no models.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

STATISTICS = ("sum", "sumsq", "count")
UNTOUCHABLE = 3.0e38
"""Score of a slot that the scope keeps out of reach: above every real score, below a protected slot's +inf."""

OPS_VERSION = 2
"""Raise it when an op's outputs change shape, strides or dtype. It is part of every rule in a graph, and so of the key
of compiled graphs that Inductor keeps on disk: an older one must not be taken for this one.
"""

LIVE, FREE, SEEN, FIRST = range(4)
"""Columns of the cursor [B, Hkv, 4]."""


@dataclass(frozen=True)
class Rule:
    stats: tuple[str, ...] = ()
    queries: int = 0
    group: str = "mean"
    heads: str = "each"
    carry: bool = True
    decode: str = "none"
    pool: str = "none"
    pool_size: int = 1
    score: str = "position"
    scope_num: int = 0
    scope_den: int = 1
    sinks: int = 0
    recent: int = 0
    recent_num: int = 0
    recent_den: int = 1
    slots: int = 0
    num: int = 1
    den: int = 1
    floor: int = 1

    @property
    def evicts(self) -> bool:
        """False when the budget is everything: nothing is scored, nothing is dropped."""
        return self.slots > 0 or self.num < self.den

    def budget(self, seen: int) -> int:
        """Slots each KV head may hold after `seen` valid tokens."""
        return self.slots if self.slots > 0 else max(self.floor, seen * self.num // self.den)

    def kept(self, seen: int) -> int:
        """Slots actually in use after `seen` valid tokens."""
        return min(seen, self.budget(seen))

    def recent_of(self, n: int) -> int:
        """Size of the protected recent window for a budget of n slots."""
        return self.recent + n * self.recent_num // self.recent_den

    def untouchable_of(self, n: int) -> int:
        """How many slots the scope keeps out of reach for a budget of n slots; 0 when there is no scope."""
        return n * self.scope_num // self.scope_den + 1 if self.scope_num else 0

    def stat(self, name: str) -> int:
        """Row of `stats` that holds the named statistic, -1 if it is not kept."""
        return self.stats.index(name) if name in self.stats else -1

    def encode(self) -> str:
        """Short readable text of the fields that differ from their defaults; ops take a rule in this form."""
        parts = [f"ops={OPS_VERSION}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                text = (
                    "+".join(value)
                    if isinstance(value, tuple)
                    else str(int(value))
                    if isinstance(value, bool)
                    else str(value)
                )
                parts.append(f"{f.name}={text}")
        return " ".join(parts)

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Rule:
        """Inverse of `encode`."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Rule)}
        values: dict[str, object] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name == "ops":
                continue
            kind = kinds[name]
            values[name] = (
                tuple(value.split("+")) if kind is tuple else bool(int(value)) if kind is bool else kind(value)
            )
        return Rule(**values)  # type: ignore[arg-type]
