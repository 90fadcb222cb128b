"""What makes it impossible to look at attention as a policy asks."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.kernels.attention.observation import STATISTICS
from kvpass.kernels.rank.scorers.registry import Scorer
from kvpass.policy.spec import Spec

Broken = tuple[bool, str, str]
"""Whether a rule is broken, the field, and the fix."""


def observed(p: Spec, chosen: Scorer | None) -> Iterator[Broken]:
    """Statistics and windows, and the scores that read them."""
    keep, watched = p.statistic.keep, p.observe.queries != 0
    for score, needs in (("sum", "sum"), ("mean", "sum"), ("important", "important"), ("last", "last")):
        fix = f"score {p.score!r} needs statistic.keep to hold {needs!r}"
        yield p.score == score and needs not in keep, "score", fix
    for score in ("mean", "important"):
        fix = f"score {score!r} needs statistic.keep to hold 'count'"
        yield p.score == score and "count" not in keep, "score", fix
    deviates = {"sum", "sumsq", "count"} <= set(keep)
    yield p.scope > 0 and not deviates and chosen is None, "scope", "a scope needs statistic.keep [sum, sumsq, count]"
    yield bool(keep) and not watched, "observe.queries", "statistics need observed queries: 'all' or a number"
    order = [s for s in STATISTICS if s in keep]
    yield list(keep) != order, "statistic.keep", f"name each once, in the order {', '.join(STATISTICS)}"
    if chosen is None:
        yield not keep and watched, "statistic.keep", "queries are observed but nothing is kept: add 'sum'"
        return
    windowed = isinstance(p.observe.queries, int) and p.observe.queries > 0
    rows = bool({"rows", "logits"} & set(chosen.reads))
    yield rows and not windowed, "observe.queries", f"scorer {p.score!r} reads an observation window: give a number"
    told = "statistics" in chosen.reads
    yield told and not keep, "statistic.keep", f"scorer {p.score!r} reads statistics: say which, e.g. [sum]"
    marks = "marks" in chosen.reads
    fix = f"scorer {p.score!r} reads the caller's marks: set protect.tokens: true"
    yield marks and not (p.protect.tokens or p.fair), "protect.tokens", fix
    yield bool(keep) and not told, "statistic.keep", f"scorer {p.score!r} reads no statistics: leave it out"


def questions(p: Spec, chosen: Scorer | None) -> Iterator[Broken]:
    """Calls that are too short to be looked at."""
    yield p.shortest < 1, "shortest", "give a number of tokens, 1 or more"
    if p.shortest <= 1:
        return
    fix = "only a scorer's scores can stay over a call that is not looked at: leave it out, or use score: window_sum"
    yield chosen is None, "shortest", fix
    own = chosen is not None and (chosen.pointwise or "hidden" in chosen.reads)
    yield own, "shortest", f"score {p.score!r} judges each token when it comes: leave it out"
    prefers = chosen is not None and chosen.preference is not None
    yield prefers, "shortest", "layers share by what each call prefers: leave it out"
    shared = p.replays or p.allocate.layers == "flat" or p.allocate.heads == "threshold"
    fix = "only where slots are shared out by scores over layers, or after a replay, may short calls evict nothing"
    yield p.when != "always" and not shared, "when", f"{fix}: set when: always"
