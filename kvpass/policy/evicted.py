"""What a policy file says of slots that go: a part of `spec.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Merge:
    """Slots that go are merged into slots that stay; as kvpress' MergingPress does where nothing is said.

    Attributes:
        into: the slot of the `nearest_key` (largest cosine); of the `nearest_position`; the `count` slots that come
            `next`; the pivot of a `run` of neighbours whose keys are alike; or `one_slot` for all, that of the first
            token behind the sinks, which stays and holds the mean of all that went.
        halves: `values`, whose keys stay as they are, or `both`.
        weight: of what comes in, where the slot's own is 1: `even`, 1 shared out over the slots; the `cosine` of both
            keys, 0 where it is negative; `cosine_norm`, that times the norm of the value that goes / norms of both; or
            `gaussian`, exp(-distance of the keys squared / 2 `sigma` squared).
        mean: sums are divided by all `weights`, by the `count` of what came in and the slot itself, or by `none`.
        gate: what is merged at all: `none` asks nothing; `moving`, whose cosine, mean over the heads, reaches the mean
            of those that went, which moves half way in each call (D2O); or `chance`, with probability attention so far
            / mean of that of the slots (CaM).
        threshold: cosine below which nothing is merged; -1: always. In a `run`: above which neighbours are alike.
        count: slots of `next`.
        sigma: of `gaussian`.
        at: calls that merge: `always`, `steps` of one token, or `calls` of several. The others drop.
        bias: of `one_slot`, added to its logit: `none`, so that it weighs as one token, or `count`, the logarithm of
            how many tokens it stands for, so that it weighs as all of them.
    """

    into: Literal["nearest_key", "nearest_position", "next", "run", "one_slot"] = "nearest_key"
    halves: Literal["values", "both"] = "values"
    weight: Literal["even", "cosine", "cosine_norm", "gaussian"] = "cosine_norm"
    mean: Literal["weights", "count", "none"] = "weights"
    gate: Literal["none", "moving", "chance"] = "none"
    threshold: float = -1.0
    count: int = 16
    sigma: float = 5.0
    at: Literal["always", "steps", "calls"] = "always"
    bias: Literal["none", "count"] = "none"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Refit:
    """Slots that stay are fitted to stand for those that go, at the end of calls of several tokens (Attention
    Matching). Each gets a bias to its logit, by which the unprotected slots of a head have the mass of all that were
    there, and then a value, by which they give the same output: both by least squares over reference queries.

    Attributes:
        queries: the reference: the last so many queries of the call, those of all query heads of the group.
        bias: bounds of a slot's bias. [0, 0]: none, values alone are fitted.
        iters: steps down the gradient after the bounds were put on.
        ridge: what changing a value (or the factor e^bias) costs, as a share of what the mean slot weighs in the sum of
            squares; 0: nothing, so that queries are fitted as well as can be.
        values: whether values are fitted too.
    """

    queries: int = 256
    bias: tuple[float, float] = (-3.0, 3.0)
    iters: int = 2
    ridge: float = 0.0
    values: bool = True

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class To:
    """The codes that tokens are demoted to. `to: int2` is `{k: int2, v: int2}`.

    Attributes:
        k, v: of keys and of values, as in `store`; `dense`: that half is never demoted.
    """

    k: str = "dense"
    v: str = "dense"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Evicted:
    """What becomes of slots that go. `evicted: drop` is nothing, `evicted: merge` is `{merge: {}}`, `evicted: refit` is
    `{refit: {}}`.

    Attributes:
        merge: into slots that stay.
        refit: slots that stay are fitted to stand for them.
        to: they stay themselves, demoted to codes; the budget is then of tokens that are whole.
    """

    merge: Merge | None = None
    refit: Refit | None = None
    to: To | None = None

    __pydantic_config__ = _STRICT

    @property
    def slots(self) -> int:
        """Slots of each head that are held for what goes, beside the sinks."""
        return int(self.merge is not None and self.merge.into == "one_slot")
