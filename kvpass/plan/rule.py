"""Policy -> Rule: the plain numbers that the ops take. A rule that can never evict observes nothing."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from kvpass.kernels.rank.criterion import INF, SCORES
from kvpass.kernels.rank.scorers.registry import encode_options, find_scorer
from kvpass.kernels.rule import Rule
from kvpass.policy.check import fraction
from kvpass.policy.layers import of_layer
from kvpass.policy.spec import Spec

SPREAD = {"flat": "model", "preference": "preference"}
"""`Rule.spread` of `allocate.layers`."""


def rule_of(policy: Spec, layer: int = 0, layers: int = 1) -> Rule:
    """The rule of a policy with a checked budget, for one layer of a model that has so many."""
    policy = of_layer(policy, layer, layers)
    allocate = policy.allocate
    if policy.keeps_all:
        return Rule()
    ranking = _ranking(policy)
    placed = "layer" in ranking.get("reads", ()) or policy.sample > 0
    placed = placed or allocate.layers == "pyramid" or allocate.heads == "table"
    return Rule(
        queries=-1 if policy.observe.queries == "all" else policy.observe.queries,
        group=policy.observe.group,
        heads=policy.observe.heads,
        carry=policy.statistic.across_calls == "add",
        pool=policy.pool.kind if policy.pool else "none",
        pool_size=policy.pool.size if policy.pool else 1,
        sinks=policy.protect.sinks,
        taper=allocate.beta if allocate.layers == "pyramid" else 0,
        layer=layer if placed else 0,
        layers=layers if allocate.layers != "uniform" else 1,
        ragged=allocate.heads != "uniform" or allocate.layers in SPREAD,
        spread="threshold" if allocate.heads == "threshold" else SPREAD.get(allocate.layers, ""),
        cut=allocate.threshold if allocate.heads == "threshold" else -INF,
        table=quote(allocate.file) if allocate.heads == "table" else "",
        seed=policy.seed,
        marked=policy.protect.tokens or policy.fair,
        rings=allocate.rings,
        when=policy.when,
        every=policy.every,
        reindex=policy.positions == "reindexed",
        fair=policy.fair,
        **ranking,
        **_weighing(policy),
        **_shares(policy),
    )


def _ranking(policy: Spec) -> dict[str, Any]:
    """What slots keep, and what ranks them."""
    asked = {
        "weight": policy.weight is not None,
        "mark": policy.protect.tokens or policy.fair,
        "place": policy.positions == "reindexed",
        "number": _numbered(policy),
        "ring": policy.allocate.rings > 0,
    }
    beside = [name for name, kept in asked.items() if kept]
    if policy.score in SCORES:
        kept = policy.statistic.keep
        decode = policy.statistic.decode if kept else "none"
        return {"stats": (*kept, *beside), "decode": decode, "score": policy.score}
    granule = policy.granule
    return {
        "stats": ("held", *beside),
        "emits": policy.statistic.keep,
        "score": "held",
        "scorer": policy.score,
        "options": encode_options(policy.options),
        "reads": find_scorer(policy.score).reads,
        "decay": policy.decay,
        "granule": granule.size if granule else 1,
        "granule_by": granule.by if granule else "mean",
    }


def _numbered(policy: Spec) -> bool:
    """Whether slots must know which of their row's tokens they are: where old ones are told apart by it, or a protected
    window may reach back over what has gone (marked tokens that went, heads whose windows grow by turns).
    """
    scored = policy.score not in SCORES and "places" in find_scorer(policy.score).reads
    apart = scored or policy.decay or policy.granule is not None or policy.sample > 0
    window = bool(policy.protect.recent or policy.protect.sinks)
    shared = policy.allocate.heads != "uniform" or policy.allocate.layers in SPREAD
    gone = policy.protect.tokens and window
    return apart or gone or (shared and isinstance(policy.protect.recent, float) and window)


def _weighing(policy: Spec) -> dict[str, Any]:
    if policy.weight is None:
        return {}
    return {"weight": policy.weight.by, "weight_floor": policy.weight.floor}


def _shares(policy: Spec) -> dict[str, Any]:
    """Fractions, as ratios of integers; only those that are not 0."""
    given: dict[str, float] = {"scope": policy.scope, "sample": policy.sample}
    if policy.weight:
        given["top"] = policy.weight.after
    if "flat" in (policy.allocate.heads, policy.allocate.layers):
        given["safe"] = policy.allocate.safeguard
    if isinstance(policy.protect.recent, float):
        given["recent"] = policy.protect.recent
    out: dict[str, Any] = {}
    for name, value in given.items():
        share = fraction(value)
        out |= {f"{name}_num": share.numerator, f"{name}_den": share.denominator}
    if isinstance(policy.protect.recent, int):
        out["recent"] = policy.protect.recent
    if not isinstance(policy.budget, float):
        return out | {"slots": int(policy.budget or 0)}
    share = fraction(policy.budget)
    return out | {"num": share.numerator, "den": share.denominator, "floor": policy.min_slots}
