"""Rule: what an op observes and how it picks victims, as plain numbers.

The tensor-level form of a planned policy (docs/design/0001-state-and-kernels.md). It knows no policy names, no graphs
and no models.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

STATISTICS = ("sum", "sumsq", "count", "important", "last")
"""What attention can emit for each key: sums of the observed probabilities, of their squares, of the queries that see
the key, and of those that give it at least an even share (1 / keys visible to the query); and one more than the
position of the newest of those, 0 if there is none. Slots keep its number among the row's valid tokens instead.
"""

SCORES = ("position", "sum", "mean", "important", "last")
"""Scores that positions and attention's statistics give by themselves; all other names are scorers'."""

HELD = "held"
"""A slot's statistic that is no sum over queries: the score that a scorer gave it, in its last multi-token call or when
it arrived.
"""

WEIGHT = "weight"
"""A slot's statistic that multiplies its score: a norm of its value."""

MARK = "mark"
"""A slot's statistic that the caller gave with its token: the number of its span, plus `KEEP` or `DROP`."""

PLACE = "place"
"""A slot's statistic: which of its row's valid tokens it is, or where its key was turned to since
(`kvpass.kernels.after_call.reindex`).
"""

NUMBER = "number"
"""A slot's statistic: which of its row's valid tokens it is, from 0, where more than the newest ones' order decides
(`kvpass.kernels.rank.places`).
"""

RING = "ring"
"""A slot's statistic: the ring that it is in (`kvpass.kernels.rank.rings`)."""

KEEP, DROP = 1 << 20, 1 << 21
"""Added to the mark of a token that must stay, or that must go when its call is over. Above every span's number; sums
are exact in float32.
"""

INF = float("inf")

UNTOUCHABLE = 3.0e38
"""Score of a slot that the scope keeps out of reach: above every real score, below a protected slot's +inf."""

OPS_VERSION = 3
"""Raise it when an op's outputs change shape, strides or dtype. It is part of every rule in a graph, and so of the key
of compiled graphs that Inductor keeps on disk: an older one must not be taken for this one.
"""

ASIDE = frozenset({"statistics", "layer", "marks", "own", "places"})
"""Words of `Rule.reads` for which nothing more is taken from a graph."""

LIVE, FREE, SEEN, FIRST, EXTRA, SHIFT = range(6)
"""Columns of the cursor [B, Hkv, 4 or 6]. The last two exist where heads have budgets of their own (`Rule.ragged`)."""


@dataclass(frozen=True)
class Rule:
    stats: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()
    queries: int = 0
    group: str = "mean"
    heads: str = "each"
    carry: bool = True
    decode: str = "none"
    pool: str = "none"
    pool_size: int = 1
    score: str = "position"
    scorer: str = ""
    options: str = ""
    reads: tuple[str, ...] = ()
    granule: int = 1
    granule_by: str = "mean"
    sample_num: int = 0
    sample_den: int = 1
    seed: int = 0
    decay: bool = False
    weight: str = "none"
    weight_floor: float = 0.0
    top_num: int = 0
    top_den: int = 1
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
    taper: int = 0
    layer: int = 0
    layers: int = 1
    ragged: bool = False
    table: str = ""
    spread: str = ""
    cut: float = -INF
    marked: bool = False
    when: str = "always"
    every: int = 1
    reindex: bool = False
    rings: int = 0
    fair: bool = False
    safe_num: int = 0
    safe_den: int = 1

    @property
    def evicts(self) -> bool:
        """False when the budget is everything: nothing is scored, nothing is dropped."""
        return self.slots > 0 or self.num < self.den or self.cut > -INF

    @cached_property
    def growing(self) -> Rule:
        """The same observations, and nothing goes: the rule of calls that do not evict."""
        return replace(self, slots=0, num=1, den=1, taper=0, cut=-INF)

    @cached_property
    def of_steps(self) -> Rule:
        """What calls of one token do under this rule: nothing goes by itself if evictions wait."""
        return self if self.when == "always" and self.every == 1 else self.growing

    def of_call(self, position: int) -> Rule:
        """What a call of several tokens does whose first is at `position`."""
        return self.growing if self.when == "first" and position > 0 else self

    def budget(self, seen: int) -> int:
        """Slots each KV head may hold after `seen` valid tokens; of a ragged rule, on average over the heads."""
        even = self._even(seen)
        return self._tapered(even) if self.taper else even

    def _even(self, seen: int) -> int:
        even = self.slots if self.slots > 0 else max(self.floor, seen * self.num // self.den)
        return even - ((even - self.sinks) % self.rings if self.rings else 0)

    def _tapered(self, even: int) -> int:
        """PyramidKV (arXiv 2406.02069): budgets fall from layer to layer by equal steps, the observation window on top,
        and together are no more than `even` for each layer.

        Ends as in Zefan-Cai/KVCache-Factory, rounded down in between. They follow from `even` alone, so that no layer's
        budget ever falls while tokens come, and a row's is no larger than that of a longer one (docs/design/0003). A
        share above a half is steep only as far as the first layer then keeps all that it has seen.
        """
        base = even - max(self.queries, 0)
        if base < (self.taper if self.slots else 1) or self.layers < 2:
            return even
        flat = 0 if self.slots else base * (2 * self.num - self.den) // self.num
        low = max(base // self.taper, flat, 1)
        high, steps = 2 * base - low, self.layers - 1
        return even - base + (low * self.layer + high * (steps - self.layer)) // steps

    @cached_property
    def emitted(self) -> tuple[str, ...]:
        """The statistics that a multi-token call computes, in order."""
        return self.emits or tuple(name for name in self.stats if name in STATISTICS)

    @property
    def columns(self) -> int:
        """Width of the cursor."""
        return 6 if self.ragged else 4

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

    @cached_property
    def plain(self) -> bool:
        """Whether sums, squares and counts are all that slots keep, and heads are alike: what Triton's decode knows."""
        kept = {HELD, WEIGHT, MARK, PLACE, NUMBER, RING, "important", "last"} & set(self.stats)
        return not (kept or self.ragged or self.top_num or self.taper)

    def emission(self, name: str) -> int:
        """Row of what a multi-token call emits that holds the named statistic, -1 if it is not emitted."""
        return self.emitted.index(name) if name in self.emitted else -1

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
        values: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name == "ops":
                continue
            kind = kinds[name]
            values[name] = (
                tuple(value.split("+")) if kind is tuple else bool(int(value)) if kind is bool else kind(value)
            )
        return Rule(**values)
