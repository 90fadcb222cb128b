"""Policy: one frozen, hashable spec of what an eviction policy observes, scores and protects.

The YAML files in `presets/` and these dataclasses are two faces of the same thing; `load.py` turns one into the other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Observe:
    """Which attention rows are looked at, and how.

    Attributes:
        queries: `all`, or the last n query rows of a multi-token call (the observation window), or 0 for none.
        group: how the query heads that share a KV head are reduced, row by row, before any statistic.
        heads: `each` KV head ranks its own slots, or `all` KV heads of a layer share the mean ranking.
    """

    queries: int | Literal["all"] = 0
    group: Literal["mean", "max"] = "mean"
    heads: Literal["each", "all"] = "each"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Statistic:
    """What is kept per slot, float32 each.

    Attributes:
        keep: of `sum` (of observed probabilities), `sumsq` (of their squares), `count` (of observing queries).
        across_calls: a multi-token call `add`s to the slots' statistics or starts `fresh`.
        decode: a one-token call `add`s its row, `replace`s the statistic with it, or does `none`.
    """

    keep: tuple[Literal["sum", "sumsq", "count"], ...] = ()
    across_calls: Literal["add", "fresh"] = "add"
    decode: Literal["add", "replace", "none"] = "add"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Pool:
    """Smoothing of the summed statistic over neighbouring tokens, once per multi-token call, outside the observation
    window.
    """

    kind: Literal["avg", "max"] = "max"
    size: int = 7

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Protect:
    """Slots that are never evicted: the first `sinks` tokens, the last `recent` (an int, or a fraction of the slots
    of the budget).
    """

    sinks: int = 0
    recent: int | float = 0

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, eq=False)
class Policy:
    """An eviction policy.

    Attributes:
        name: what reports call it.
        score: what ranks unprotected slots, higher = keep: `position` (newer), `sum`, `mean` (sum / count).
        scope: RoCo: this fraction of the slots, those with the largest standard deviation, cannot be evicted; 0 = no
            scope.
        budget: fraction of the tokens seen so far (float, at most 1.0) or slots per KV head (int). None: the caller
            says.
        min_slots: a fractional budget never asks for fewer slots.
        paper, source, notes: where it comes from and where it deviates, for people.
    """

    name: str
    observe: Observe = field(default_factory=Observe)
    statistic: Statistic = field(default_factory=Statistic)
    pool: Pool | None = None
    score: Literal["position", "sum", "mean"] = "position"
    scope: float = 0.0
    protect: Protect = field(default_factory=Protect)
    budget: int | float | None = None
    min_slots: int = 64
    paper: str = ""
    source: str = ""
    notes: str = ""

    __pydantic_config__ = _STRICT

    @staticmethod
    def load(policy: str | Path | Policy | dict[str, Any]) -> Policy:
        """A built-in name, a path to a YAML file, a dict, or a Policy, checked.

        Raises:
            PolicyError: unknown name or key (with the nearest valid one), wrong type, impossible combination.
        """
        from kvpass.policy.load import load

        return load(policy)

    def with_budget(self, budget: int | float | None) -> Policy:
        """The same policy with the caller's budget, checked; None keeps the policy's own.

        Raises:
            PolicyError: no budget at all, or one that is impossible for this policy.
        """
        from kvpass.policy.check import check_budget

        chosen = self if budget is None else replace(self, budget=budget)
        check_budget(chosen, given=budget is not None, own=self.budget)
        return chosen

    def __eq__(self, other: object) -> bool:
        """As YAML would say it: a budget of 1 (slot) is not a budget of 1.0 (everything)."""
        return isinstance(other, Policy) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a YAML file would say it."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Short hash of all that decides behaviour; equal policies share compiled graphs."""
        decisive = {k: v for k, v in self.to_dict().items() if k not in ("paper", "source", "notes")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
