"""Spec: one frozen, hashable description of what an eviction policy observes, scores and protects.

The YAML files in `presets/` and these dataclasses are two faces of the same thing; `load.py` turns one into the other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvpass.policy.evicted import Evicted

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Observe:
    """Which attention rows are looked at, and how.

    Attributes:
        queries: `all`, or the last n query rows of a multi-token call (the observation window), or 0 for none.
        group: how the query heads that share a KV head are reduced, row by row, before any statistic.
        heads: `each` KV head ranks its own slots, or `all` KV heads of a layer share the mean ranking.
        replay: `none`, or `repeat`: the tokens of each call of several are fed again, behind it, before anything goes,
            and leave no trace but the score `replay`.
    """

    queries: int | Literal["all"] = 0
    group: Literal["mean", "max"] = "mean"
    heads: Literal["each", "all"] = "each"
    replay: Literal["none", "repeat"] = "none"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Statistic:
    """What is kept per slot, float32 each.

    Attributes:
        keep: of `sum` (of observed probabilities), `sumsq` (of their squares), `count` (of observing queries),
            `important` (of queries that gave the slot at least an even share, 1 / slots they see), `last` (position of
            the newest of those, plus 1).
        across_calls: a multi-token call `add`s to the slots' statistics or starts `fresh`.
        decode: a one-token call `add`s its row, `replace`s the statistic with it, or does `none`.
    """

    keep: tuple[Literal["sum", "sumsq", "count", "important", "last"], ...] = ()
    across_calls: Literal["add", "fresh"] = "add"
    decode: Literal["add", "replace", "none"] = "add"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Pool:
    """Smoothing of the summed statistic, or of a scorer's score, over neighbouring tokens, once per multi-token call,
    outside the observation window.
    """

    kind: Literal["avg", "max"] = "max"
    size: int = 7

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Protect:
    """Slots that are never evicted: the first `sinks` tokens, the last `recent` (an int, or a fraction of the slots
    of the budget), and `tokens` that the caller marks (`with kvpass.marked(keep=..)`).
    """

    sinks: int = 0
    recent: int | float = 0
    tokens: bool = False

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Weight:
    """What multiplies a slot's score.

    Attributes:
        by: `l1` or `l2` norm of its value; `vo_l1`, the L1 norm of value times output projection, mean over the query
            heads of the group; `vo_l1_share`, that divided by its sum over the KV heads.
        floor: added to the score before.
        after: this share of the budget is kept for the score without the weight first (CriticalKV).
    """

    by: Literal["l1", "l2", "vo_l1", "vo_l1_share"] = "l1"
    floor: float = 0.0
    after: float = 0.0

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Granule:
    """Neighbouring tokens that stay or go together: `size` tokens, scored by their `mean` or the mean of their
    `top_half`. The budget is kept exactly: the last granule may be cut, its older tokens stay.
    """

    size: int = 10
    by: Literal["mean", "top_half"] = "mean"

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Allocate:
    """Who gets how much of the budget.

    Attributes:
        layers: `uniform`; `pyramid`: budgets fall from layer to layer by equal steps, to about 1 / `beta`; `flat`: the
            model's best slots stay, whatever layer and head they belong to; or `preference`: by what the scorer says
            of each layer (CAKE). The last two are shared out when a call of several tokens has passed all layers,
            which hold dense keys and values until then.
        heads: `uniform`; `flat`: a layer's best slots stay, whatever head they belong to (Ada-KV); `table`: by the
            shares in `file`; or `threshold`: what scores below `threshold` goes, and the budget is the most that a
            head may hold (also shared out at the end of a call of several tokens).
        safeguard: with `flat`, this share of the even budget is safe in each head.
        threshold: a score. In a call of one token each head drops one slot below it at most.
        rings: 0, or into how many rings the slots beside the sinks are parted (Cascading KV): ring i takes every 2**i
            tokens, so that old ones thin out. The budget is rounded down to whole rings.
        file: with `table`, `torch.save` of {"heads": tensor [layers, Hkv]} of shares >= 0; a relative path starts at
            the policy's folder.
    """

    layers: Literal["uniform", "pyramid", "flat", "preference"] = "uniform"
    beta: int = 20
    heads: Literal["uniform", "flat", "table", "threshold"] = "uniform"
    safeguard: float = 0.2
    threshold: float = 0.0
    rings: int = 0
    file: str = ""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Store:
    """What a slot holds. `store: int4` is `{k: int4, v: int4}`.

    Attributes:
        k, v: how keys and values are held: `dense`, as the model has them; `int8`, `int4`, `int3` or `int2`, codes
            between the lowest and the highest entry of a group; `int8_symmetric`, `int4_symmetric`, around 0;
            `fp8_e4m3`, `fp8_e5m2`; `float16`; `turbo4`, `turbo3`, `turbo2`, levels of a normal distribution times a
            group's norm; `ternary`, three levels; `mixed_2_1`, two bits for one half of the channels, one for the
            other; `csr8`, `csr4`, so many atoms of a dictionary. Scales are float16.
        rotate: `hadamard`: rotated by Hadamard matrices first, which spreads outliers over a head, or `none`.
        group: neighbouring entries of a head that share a scale: a number, or a share of a key (0.5: half).
        residual: the newest so many tokens are held whole as well, and read whole.
        sinks: so are each row's first ones.
        fit_k, fit_v: what the first call makes of each head's vectors before they are coded, from then on: `none`;
            keys are `balance`d against its queries, channel by channel (MiKV); the `range` of each channel becomes the
            same (KIVI), also of values; only the `channels` that matter most are coded (ThinK); keys are sorted by
            `spread`, and what spreads little becomes frequencies (VidKV); or `atoms` for sparse codes are taken from
            them, also from values (CSR).
        channels: share of a head's channels that `fit_k: channels` leaves.
        atoms: how many `atoms` a head's dictionary has.
    """

    k: str = "dense"
    v: str = "dense"
    rotate: Literal["none", "hadamard"] = "hadamard"
    group: int | float = 64
    residual: int = 32
    sinks: int = 4
    fit_k: Literal["none", "balance", "range", "channels", "spread", "atoms"] = "none"
    fit_v: Literal["none", "range", "atoms"] = "none"
    channels: float = 0.6
    atoms: int = 256

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, eq=False)
class Spec:
    """An eviction policy.

    Attributes:
        name: what reports call it.
        observe, statistic: which rows of attention are looked at; what is kept of them per slot.
        pool, granule: how scores are smoothed over neighbouring tokens; which neighbours stay or go together.
        weight: what of a slot's value multiplies its score.
        allocate: how the budget is shared out over layers and KV heads.
        protect: tokens that are never evicted.
        evicted: what becomes of slots that go: they are dropped, merged, or stood for by those that stay.
        store: what a slot holds: numbers as the model has them, or codes of few bits.
        score: what ranks unprotected slots, higher = keep: `position` (newer), `sum`, `mean` (sum / count),
            `important` (important / count), `last` (minus the tokens since the newest such query), or the name of a
            scorer.
        options: of the scorer.
        fair: spans that the caller marks (`with kvpass.marked(spans=..)`) each keep their share of the budget.
        decay: the score counts once for each token since the slot's own (TRIM-KV's log-retention).
        sample: this share of the budget is drawn by chance, with probability softmax(score) (NACL).
        seed: of all chance.
        positions: `kept`, or `reindexed`: kept keys are turned as if nothing had stood between them; needs RoPE.
        when: what is above the budget goes at the end of each call (`always`), only of calls of several tokens, so that
            generated tokens all stay until the next (`calls`), or only of the cache's first call, after which it grows
            by every token (`first`).
        every: of generated tokens, so many come before what is above the budget goes, all at once.
        shortest: a later call that brings a row fewer tokens, say a question, is as if these had been generated: no
            scorer looks at it and nothing is replayed, scores stay, and with `when: calls` nothing goes.
        scope: RoCo: this fraction of the slots, those with the largest standard deviation, cannot be evicted; 0 = no
            scope.
        layers: what differs in some layers, by number (`0`, `-1` is the last) or range (`0-3`): fields as of a whole
            policy, laid over this one key by key; or another policy instead, if they say `extends`.
        budget: fraction of the tokens seen so far (float, at most 1.0) or slots per KV head (int). None: the caller
            says. `20% bytes` is 0.2 with `unit: bytes`.
        unit: what a fraction is of: the `tokens` seen, or the `bytes` that an unmodified cache holds of them; codes,
            scales, positions and statistics together then hold so much.
        min_slots: a fractional budget never asks for fewer slots.
        paper, source, notes: where it comes from and where it deviates, for people.
    """

    name: str
    observe: Observe = field(default_factory=Observe)
    statistic: Statistic = field(default_factory=Statistic)
    pool: Pool | None = None
    score: str = "position"
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    fair: bool = False
    decay: bool = False
    granule: Granule | None = None
    sample: float = 0.0
    seed: int = 0
    weight: Weight | None = None
    when: Literal["always", "calls", "first"] = "always"
    every: int = 1
    shortest: int = 1
    scope: float = 0.0
    allocate: Allocate = field(default_factory=Allocate)
    protect: Protect = field(default_factory=Protect)
    evicted: Evicted = field(default_factory=Evicted)
    store: Store = field(default_factory=Store)
    positions: Literal["kept", "reindexed"] = "kept"
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    budget: int | float | None = None
    unit: Literal["tokens", "bytes"] = "tokens"
    min_slots: int = 64
    paper: str = ""
    source: str = ""
    notes: str = ""

    __pydantic_config__ = _STRICT

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever evicted: a budget of 1.0 (1 is one slot), and no threshold beside it."""
        return isinstance(self.budget, float) and self.budget == 1.0 and self.allocate.heads != "threshold"

    @property
    def replays(self) -> bool:
        """Whether the tokens of calls are fed again before something is evicted."""
        return self.observe.replay != "none" and not self.keeps_all

    @property
    def asked(self) -> int | float | str | None:
        """The budget as a caller would write it: `20% bytes` where it is one of bytes."""
        if self.unit == "bytes" and isinstance(self.budget, float):
            return f"{100 * self.budget:g}% bytes"
        return self.budget

    def __eq__(self, other: object) -> bool:
        """As YAML would say it, in any order: a budget of 1 (slot) is not a budget of 1.0 (everything)."""
        return isinstance(other, Spec) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def _text(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a YAML file would say it."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Short hash of all that decides behaviour; equal policies share compiled graphs."""
        decisive = {k: v for k, v in self.to_dict().items() if k not in ("paper", "source", "notes")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
