"""What slots hold after merging, in float64 and plain Python: lists, loops and the formulas of shared/policies.md.

A `Head` is one KV head of one row, its tokens numbered from 0 without padding. Which tokens stay is the library's word;
what their keys and values become is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Vector = list[float]
Row = dict[str, Any]
"""What one row's exits remember, and count for tests."""


@dataclass
class Token:
    key: Vector
    value: Vector
    sum: float = 0.0


@dataclass
class Head:
    index: int
    layer: int
    tokens: dict[int, Token] = field(default_factory=dict)
    merged: int = 0

    def attend(self, queries: list[list[Vector]], numbers: list[int], scale: float) -> None:
        """queries [group][S]: each token's attention, mean over the group, is added to what it got."""
        for at, number in enumerate(numbers):
            seen = [n for n in sorted(self.tokens) if n <= number]
            for group in queries:
                powers = [math.exp(scale * dot(group[at], self.tokens[n].key)) for n in seen]
                for n, power in zip(seen, powers, strict=True):
                    self.tokens[n].sum += power / sum(powers) / len(queries)


@dataclass
class Facts:
    """What a policy says, and the call."""

    step: bool
    end: int
    budget: int
    options: dict[str, Any]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / norm(a) / norm(b)


def plus(a: Vector, b: Vector, weight: float = 1.0) -> Vector:
    return [x + weight * y for x, y in zip(a, b, strict=True)]


def times(a: Vector, factor: float) -> Vector:
    return [x * factor for x in a]


def nearest(head: Head, token: int, kept: list[int]) -> tuple[int, float]:
    """The kept token of the largest cosine, and that."""
    found = [(cosine(head.tokens[token].key, head.tokens[n].key), n) for n in kept]
    best = max(c for c, _ in found)
    assert sum(best - c < 1e-6 for c, _ in found) == 1, "a tie that float32 may see otherwise"
    return next((n, c) for c, n in found if c == best)


def mean_of(own: Vector, others: list[Vector]) -> Vector:
    total = own
    for one in others:
        total = plus(total, one)
    return times(total, 1 / (1 + len(others)))


def merging(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """Sheet 3.7: values into the nearest key, weight max(cos, 0) * |v_e| / (|v_e| + |v_t|)."""
    for head, leaving, staying in zip(heads, gone, kept, strict=True):
        sums: dict[int, tuple[Vector, float]] = {}
        for e in leaving:
            t, similar = nearest(head, e, staying)
            if similar < facts.options.get("threshold", -1):
                continue
            ours, theirs = head.tokens[e].value, head.tokens[t].value
            weight = max(similar, 0) * norm(ours) / (norm(ours) + norm(theirs))
            total, weights = sums.get(t, (theirs, 1.0))
            sums[t] = plus(total, ours, weight), weights + weight
        for t, (total, weights) in sums.items():
            head.tokens[t].value = times(total, 1 / weights)


def uniform(number: int, head: Head, seed: int) -> float:
    x = number + 0x9E3779B1 * (head.index + 1) + 0x85EBCA77 * (head.layer + 1) + 0xC2B2AE3D * (seed + 31 + 1)
    x &= 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x >> 9) + 0.5) / 2**23


def cam(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """Sheet 3.5 and S7.3: in steps v_e / m onto the next m values, with probability sum_e / mean of theirs."""
    for head, leaving, staying in zip(heads, gone, kept, strict=True):
        more: list[tuple[int, Vector]] = []
        for e in leaving if facts.step else []:
            window = [n for n in staying if n > e][: facts.options["count"]]
            if not window:
                continue
            p = min(head.tokens[e].sum / (sum(head.tokens[n].sum for n in window) / len(window)), 1)
            u = uniform(e, head, facts.options.get("seed", 0))
            assert abs(u - p) > 1e-4, "a draw that float32 may see otherwise"
            row["draws"] = [*row.get("draws", []), u < p]
            if u < p:
                more += [(n, times(head.tokens[e].value, 1 / len(window))) for n in window]
        for n, part in more:
            head.tokens[n].value = plus(head.tokens[n].value, part)


def d2o(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """Sheet 3.4 and S7.2: one decision for the i-th token that goes in each head; mean of target and w * token."""
    assert len({len(leaving) for leaving in gone}) == 1
    found = [[nearest(h, e, k) for e in g] for h, g, k in zip(heads, gone, kept, strict=True)]
    if not gone[0]:
        return
    means = [sum(of[i][1] for of in found) / len(heads) for i in range(len(gone[0]))]
    now = sum(means) / len(means)
    row["bar"] = now if "bar" not in row else 0.5 * row["bar"] + 0.5 * now
    passed = [m >= row["bar"] for m in means]
    assert len(means) == 1 or all(abs(m - row["bar"]) > 1e-6 for m in means)
    row["passed"] = row.get("passed", []) + passed
    for head, leaving, where in zip(heads, gone, found, strict=True):
        for t in {t for t, _ in where}:
            mine = [(e, c) for e, (to, c), ok in zip(leaving, where, passed, strict=True) if to == t and ok]
            own = head.tokens[t]
            keys = [times(head.tokens[e].key, max(c, 0)) for e, c in mine]
            values = [times(head.tokens[e].value, max(c, 0)) for e, c in mine]
            own.key, own.value = mean_of(own.key, keys), mean_of(own.value, values)


def kvmerger(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """Sheet 3.6 and S7.1: runs, backwards; the pivot has most attention; what goes, into a pivot that stays."""
    for head, leaving, staying in zip(heads, gone, kept, strict=True):
        recent = facts.budget * 34 // 100
        free = [n for n in sorted(head.tokens) if n < facts.end - recent]
        runs: list[list[int]] = []
        order = sorted(head.tokens)
        for n in reversed(free):
            after = order[order.index(n) + 1] if order.index(n) + 1 < len(order) else -1
            joined = bool(runs) and runs[-1][-1] == after
            if joined and cosine(head.tokens[n].key, head.tokens[after].key) > facts.options["threshold"]:
                runs[-1].append(n)
            else:
                runs.append([n])
        for run in [] if facts.step else runs:
            pivot = max(run, key=lambda n: head.tokens[n].sum)
            others = [n for n in run if n in leaving]
            if pivot not in staying or not others:
                continue
            row["runs"] = row.get("runs", 0) + 1
            own = head.tokens[pivot]
            apart = {n: norm(plus(own.key, head.tokens[n].key, -1.0)) for n in others}
            g = {n: math.exp(-(apart[n] ** 2) / (2 * facts.options["sigma"] ** 2)) for n in others}
            for half in ("key", "value"):
                total = getattr(own, half)
                for n in others:
                    total = plus(total, getattr(head.tokens[n], half), g[n])
                setattr(own, half, times(total, 1 / (1 + sum(g.values()))))


def elastic(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """R8: into the nearest kept position, mean of the slot and of all that comes; steps drop."""
    for head, leaving, staying in zip(heads, gone, kept, strict=True):
        into: dict[int, list[int]] = {}
        for e in [] if facts.step else leaving:
            into.setdefault(min(staying, key=lambda n: (abs(n - e), n)), []).append(e)
        for t, those in into.items():
            own = head.tokens[t]
            own.key = mean_of(own.key, [head.tokens[e].key for e in those])
            own.value = mean_of(own.value, [head.tokens[e].value for e in those])


def razor(heads: list[Head], gone: list[list[int]], kept: list[list[int]], facts: Facts, row: Row) -> None:
    """Sheet 3.1: the mean of all that was ever dropped; the first token behind 4 sinks counts as dropped."""
    for head, leaving, staying in zip(heads, gone, kept, strict=True):
        if not leaving:
            continue
        assert 4 in staying
        own = head.tokens[4]
        for half in ("key", "value"):
            total = times(getattr(own, half), 1 + head.merged)
            for e in leaving:
                total = plus(total, getattr(head.tokens[e], half))
            setattr(own, half, times(total, 1 / (1 + head.merged + len(leaving))))
        head.merged += len(leaving)


EXITS: dict[str, Callable[[list[Head], list[list[int]], list[list[int]], Facts, Row], None]] = {
    "merging": merging,
    "cam": cam,
    "d2o": d2o,
    "kvmerger": kvmerger,
    "elastic_cache": elastic,
    "razor_attention": razor,
    "drop": lambda *_: None,
}
