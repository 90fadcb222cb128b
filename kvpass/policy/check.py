"""What makes a policy or a budget impossible, said before any compilation."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import isfinite

from kvpass.errors import PolicyError
from kvpass.kernels.codecs.registry import DENSE
from kvpass.kernels.rank.criterion import SCORES
from kvpass.kernels.rank.scorers.registry import Scorer, scorers
from kvpass.policy.check_demoting import demoting
from kvpass.policy.check_exits import exits
from kvpass.policy.check_observe import observed, questions
from kvpass.policy.check_replay import replaying
from kvpass.policy.check_store import fits, named
from kvpass.policy.limits import MOST, check_options, no_number, oversized
from kvpass.policy.spec import Spec

Broken = tuple[bool, str, str]
"""Whether a rule is broken, the field, and the fix."""


def check_policy(p: Spec, where: str) -> None:
    """Values and combinations of fields that cannot work.

    Raises:
        PolicyError: naming the field and the fix.
    """
    chosen = _scorer(p, where)
    for rules in (
        _numbers(p),
        observed(p, chosen),
        questions(p, chosen),
        _transforms(p, chosen),
        _sharing(p, chosen),
        _when(p),
        _store(p),
        exits(p),
        demoting(p),
        replaying(p),
    ):
        for broken, field, fix in rules:
            if broken:
                raise PolicyError(f"policy {p.name!r}: bad value in {field}", where=where, hint=fix)
    if chosen is not None:
        check_options(p, chosen, where)


def _scorer(p: Spec, where: str) -> Scorer | None:
    """The scorer that a policy names; None if it ranks by statistics."""
    if p.score in SCORES:
        return None
    known = scorers()
    if p.score not in known:
        names = [*SCORES, *known]
        near = difflib.get_close_matches(p.score, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(
            f"bad value {p.score!r} in 'score'",
            where=where,
            hint=f"{hint}statistics: {', '.join(SCORES)}; scorers: {', '.join(known)}; your own: @kvpass.scorer",
        )
    return known[p.score]


def _numbers(p: Spec) -> Iterator[Broken]:
    recent = p.protect.recent
    yield not p.name.strip() or not p.name.isprintable(), "name", "give a word or two, on one line"
    yield from ((True, path, f"give a number up to {MOST}") for path in oversized(p.to_dict()))
    yield not 0 <= p.scope < 1, "scope", "give a fraction from 0 to below 1"
    yield isinstance(p.observe.queries, int) and p.observe.queries < 0, "observe.queries", "give 'all' or a number >= 0"
    yield p.protect.sinks < 0, "protect.sinks", "give a number >= 0"
    yield recent < 0, "protect.recent", "give a number >= 0"
    whole = isinstance(recent, float) and not recent < 1
    yield whole, "protect.recent", "a fraction must be below 1; give an int for tokens"
    yield p.min_slots < 1, "min_slots", "give a number >= 1"
    yield p.pool is not None and (p.pool.size < 1 or p.pool.size % 2 == 0), "pool.size", "give an odd number"
    yield p.granule is not None and p.granule.size < 2, "granule.size", "give a number of tokens, 2 or more"
    yield not 0 <= p.sample < 1, "sample", "give a share of the budget from 0 to below 1"
    yield not 0 <= p.seed < 2**31, "seed", "give a number from 0 to 2147483647"
    if p.weight is not None:
        yield not 0 <= p.weight.floor < float("inf"), "weight.floor", "give a number >= 0, e.g. 1e-4"
        yield not 0 <= p.weight.after < 1, "weight.after", "give a share of the budget from 0 to below 1"
    yield p.allocate.beta < 2, "allocate.beta", "give 2 or more: the last layer gets about 1 / beta of the even budget"
    safe = p.allocate.safeguard
    yield not 0 <= safe <= 1, "allocate.safeguard", "give a share of the even budget from 0 to 1"


def _transforms(p: Spec, chosen: Scorer | None) -> Iterator[Broken]:
    windowed = isinstance(p.observe.queries, int)
    pooled, held = p.pool is not None, chosen is not None
    fix = "pooling smooths 'sum': add it to statistic.keep"
    yield pooled and not held and "sum" not in p.statistic.keep, "pool", fix
    again = pooled and not windowed and not held and p.statistic.across_calls == "add"
    fix = "a sum that goes on over calls would be smoothed again in each: set statistic.across_calls: fresh"
    yield again, "statistic.across_calls", fix
    fix = "granules need a score that stays once it is given: use score: window_sum, or another scorer"
    yield p.granule is not None and not held, "granule", fix
    fix = "drawing by chance needs a score that stays once it is given: use score: window_sum, or another scorer"
    yield p.sample > 0 and not held, "sample", fix
    yield bool(p.options) and not held, "options", f"score {p.score!r} has no options: leave them out"
    yield p.scope > 0 and held, "scope", "a scope needs the statistics of score: mean"
    fix = "spans rank by a score that stays once it is given: use score: window_sum, or another scorer"
    yield p.fair and not held, "fair", fix
    yield p.decay and not held, "decay", "only a scorer's score decays: name one in score"
    once = held and chosen is not None and bool({"hidden", "own"} & set(chosen.reads))
    fix = "this score is given when a token comes, and cannot be changed among neighbours later"
    yield once and pooled, "pool", fix
    yield once and p.granule is not None, "granule", fix
    yield once and p.sample > 0, "sample", fix
    weighed = p.weight is not None
    yield weighed and p.score == "position", "weight", "a position has no weight: rank by a statistic or a scorer"
    both = p.weight is not None and p.weight.after > 0 and p.scope > 0
    yield both, "weight.after", "a scope already says what is out of reach: leave one of them out"


def _sharing(p: Spec, chosen: Scorer | None) -> Iterator[Broken]:
    flat, table = (p.allocate.heads == kind for kind in ("flat", "table"))
    shared = p.observe.heads == "all"
    yield (flat or table) and shared, "allocate.heads", "heads that share one ranking hold equally many slots"
    by_data = p.allocate.layers in ("flat", "preference")
    fix = f"layers that share by data ({p.allocate.layers!r}) share over all heads: leave allocate.heads out"
    yield by_data and p.allocate.heads != "uniform", "allocate.heads", fix
    yield by_data and shared, "allocate.layers", "heads that share one ranking hold equally many slots in each layer"
    prefers = chosen is not None and chosen.preference is not None
    fix = "no layer is preferred by this score: use score: cake, or a scorer of your own with preference="
    yield p.allocate.layers == "preference" and not prefers, "allocate.layers", fix
    fix = "positions rank all layers alike: rank by what differs"
    yield p.allocate.layers == "flat" and p.score == "position", "allocate.layers", fix
    rings = p.allocate.rings > 0
    yield p.allocate.rings < 0, "allocate.rings", "give a number of rings, e.g. 4"
    shares = p.allocate.heads != "uniform" or p.allocate.layers != "uniform"
    yield rings and shares, "allocate.rings", "rings are of equal size in all heads and layers: leave the shares out"
    fix = "rings say by themselves what is recent: protect sinks only"
    yield rings and (p.protect.recent != 0 or p.protect.tokens or p.fair), "protect", fix
    own = chosen is not None or p.scope > 0 or p.weight is not None or p.score == "position"
    yield rings and own, "allocate.rings", "duels are by attention's statistics: use score: sum, mean or important"
    cut = p.allocate.heads == "threshold"
    yield cut and shared, "allocate.heads", "heads that share one ranking hold equally many slots"
    yield (
        cut and p.allocate.layers != "uniform",
        "allocate.layers",
        "a threshold needs no shares of layers: leave it out",
    )
    yield (
        cut and p.score == "position",
        "allocate.heads",
        "no threshold fits all lengths: use protect.recent, or a scorer",
    )
    yield not isfinite(p.allocate.threshold), "allocate.threshold", "give a finite score"
    yield not cut and p.allocate.threshold != 0, "allocate.threshold", "set allocate.heads: threshold, or leave it out"
    fix = "only a table has a file: set allocate.heads: table, or leave allocate.file out"
    yield bool(p.allocate.file) and not table, "allocate.file", fix
    yield flat and p.score == "position", "allocate.heads", "positions rank all heads alike: rank by what differs"
    fix = "the score of a whole layer has no head's own scores to compare: set observe.heads: each"
    yield p.weight is not None and p.observe.heads == "all" and p.score != "position", "weight", fix


def _when(p: Spec) -> Iterator[Broken]:
    late, rings = p.every > 1, p.allocate.rings > 0
    by_data = p.allocate.layers in ("flat", "preference") or p.allocate.heads == "threshold"
    yield p.every < 1, "every", "give a number of generated tokens, 1 or more"
    yield late and p.when != "always", "every", f"when: {p.when} evicts no generated token: leave one of both out"
    yield late and by_data, "every", "shares that only data decide are given at the end of calls: set when: calls"
    for field, given in (("every", late), ("when", p.when != "always")):
        yield rings and given, field, "a token that comes must find its ring: leave it out"
    fix = "heads with budgets of their own are laid out anew by each call of several tokens: set when: calls"
    yield p.when == "first" and (by_data or p.allocate.heads != "uniform"), "when", fix


def _store(p: Spec) -> Iterator[Broken]:
    held = p.store
    yield from named(held, "store")
    share, fix = isinstance(held.group, float), "give a number of entries, e.g. 64, or a share of a key, e.g. 0.5"
    yield not 0 < held.group <= 1 if share else held.group < 1, "store.group", fix
    yield held.residual < 0, "store.residual", "give a number of tokens, 0 or more"
    yield held.sinks < 0, "store.sinks", "give a number of tokens, 0 or more"
    fix = "keys that are held as codes cannot be turned to new positions: set positions: kept, or store.k: dense"
    yield held.k != DENSE and p.positions == "reindexed", "positions", fix
    yield from fits(p)
    yield from _unit(p)


def _unit(p: Spec) -> Iterator[Broken]:
    """What a budget in bytes cannot be: also asked of the caller's."""
    fix = "a number of slots is no share of bytes: give a fraction, e.g. 0.2, or set unit: tokens"
    yield p.unit == "bytes" and isinstance(p.budget, int), "unit", fix
    shared = p.allocate.heads == "threshold" or p.allocate.layers == "pyramid"
    fix = "pyramids and thresholds share slots out, not bytes: set unit: tokens"
    yield p.unit == "bytes" and shared, "unit", fix


def check_budget(p: Spec, *, given: bool, own: int | float | None) -> None:
    """A budget that this policy cannot keep.

    Raises:
        PolicyError: naming the budget and the fix.
    """
    where = f"policy {p.name!r}, budget={reprlib.repr(p.budget)}"
    b = p.budget
    if b is None:
        raise PolicyError(
            "no budget",
            where=where,
            hint="give budget=0.2 (fraction of the tokens seen) or budget=1024 (slots per KV head)",
        )
    if isinstance(b, bool) or not isinstance(b, (int, float)):
        raise PolicyError(f"a budget is a float or an int, not {type(b).__name__}", where=where, hint=no_number(b))
    if isinstance(b, float) and not 0.0 < b <= 1.0:
        raise PolicyError(
            "a fractional budget lies above 0 and at most at 1.0",
            where=where,
            hint=f"budget=0.2 keeps a fifth; for slots give an int, e.g. {int(b) if 1 < b <= MOST else 1024}",
        )
    if isinstance(b, int) and not 1 <= b <= MOST:
        raise PolicyError(f"a budget of slots is at least 1 and at most {MOST}", where=where, hint="give budget=1024")
    for broken, field, fix in _unit(p):
        if broken:
            raise PolicyError(f"policy {p.name!r}: bad value in {field}", where=where, hint=fix)
    whole = isinstance(b, float) and b == 1.0
    if given and replace(p, budget=own).keeps_all and not p.keeps_all:
        raise PolicyError(
            f"policy {p.name!r} keeps everything", where=where, hint="leave budget out, or choose an evicting policy"
        )
    smallest = smallest_budget(p)
    protected = p.protect.sinks + recent_of(p, smallest) + p.allocate.rings + p.evicted.slots
    if not whole and p.allocate.heads != "threshold" and protected > smallest:
        whose = " of the last layer" if p.allocate.layers == "pyramid" else ""
        raise PolicyError(
            f"the budget{whose} can be as small as {smallest} slots, but {protected} are protected "
            f"(sinks {p.protect.sinks}, recent {p.protect.recent})",
            where=where,
            hint="raise the budget or min_slots, or protect less",
        )


def smallest_budget(p: Spec) -> int:
    """The least that a layer gets under a checked budget: a pyramid's last layer, as `Pyramid` makes it."""
    slots = p.budget if isinstance(p.budget, int) else p.min_slots
    if p.allocate.layers != "pyramid":
        return slots
    from kvpass.kernels.attention.observation import Observation
    from kvpass.kernels.budget import Budget, budget
    from kvpass.kernels.rank.layer import Layer
    from kvpass.kernels.rank.pyramid import Pyramid
    from kvpass.kernels.rule import Rule

    window = p.observe.queries if isinstance(p.observe.queries, int) else 0
    share = fraction(1.0 if isinstance(p.budget, int) else p.budget or 1.0)
    asked = Budget(slots) if isinstance(p.budget, int) else Budget(0, share.numerator, share.denominator, slots)
    last = Rule(Observation(queries=window), asked, Layer(1, 2), Pyramid(p.allocate.beta))
    return int(budget(last, 0))


def fraction(value: float) -> Fraction:
    """The nearest ratio with a denominator up to 65,536: budgets are then exact in integer arithmetic everywhere."""
    return Fraction(value).limit_denominator(65_536)


def recent_of(p: Spec, n: int) -> int:
    """Protected recent slots of a budget of n slots."""
    if isinstance(p.protect.recent, int):
        return p.protect.recent
    share = fraction(p.protect.recent)
    return n * share.numerator // share.denominator
