"""What makes a policy or a budget impossible, said before any compilation."""

from __future__ import annotations

from fractions import Fraction

from kvpass.errors import PolicyError
from kvpass.policy.spec import Policy


def check_policy(p: Policy, where: str) -> None:
    """Combinations of fields that cannot work.

    Raises:
        PolicyError: naming the field and the fix.
    """
    keep = p.statistic.keep
    rules = [
        (
            p.score in ("sum", "mean") and "sum" not in keep,
            "score",
            f"score {p.score!r} needs statistic.keep to hold 'sum'",
        ),
        (p.score == "mean" and "count" not in keep, "score", "score 'mean' needs statistic.keep to hold 'count'"),
        (
            p.scope > 0 and set(keep) != {"sum", "sumsq", "count"},
            "scope",
            "a scope needs statistic.keep [sum, sumsq, count]",
        ),
        (not 0 <= p.scope < 1, "scope", "give a fraction from 0 to below 1"),
        (
            bool(keep) and p.observe.queries == 0,
            "observe.queries",
            "statistics need observed queries: 'all' or a number",
        ),
        (not keep and p.observe.queries != 0, "statistic.keep", "queries are observed but nothing is kept: add 'sum'"),
        (
            isinstance(p.observe.queries, int) and p.observe.queries < 0,
            "observe.queries",
            "give 'all' or a number >= 0",
        ),
        (p.pool is not None and "sum" not in keep, "pool", "pooling smooths 'sum': add it to statistic.keep"),
        (p.pool is not None and (p.pool.size < 1 or p.pool.size % 2 == 0), "pool.size", "give an odd number"),
        (
            p.pool is not None and p.observe.queries == "all",
            "pool",
            "pooling needs an observation window: observe.queries as a number",
        ),
        (p.protect.sinks < 0, "protect.sinks", "give a number >= 0"),
        (p.protect.recent < 0, "protect.recent", "give a number >= 0"),
        (
            isinstance(p.protect.recent, float) and not p.protect.recent < 1,
            "protect.recent",
            "a fraction must be below 1; give an int for tokens",
        ),
        (p.min_slots < 1, "min_slots", "give a number >= 1"),
        (
            list(keep) != [s for s in ("sum", "sumsq", "count") if s in keep],
            "statistic.keep",
            "name each once, in the order sum, sumsq, count",
        ),
    ]
    for broken, field, fix in rules:
        if broken:
            raise PolicyError(f"policy {p.name!r}: bad value in {field}", where=where, hint=fix)


def check_budget(p: Policy, *, given: bool, own: int | float | None) -> None:
    """A budget that this policy cannot keep.

    Raises:
        PolicyError: naming the budget and the fix.
    """
    where = f"policy {p.name!r}, budget={p.budget!r}"
    b = p.budget
    if b is None:
        raise PolicyError(
            "no budget",
            where=where,
            hint="give budget=0.2 (fraction of the tokens seen) or budget=1024 (slots per KV head)",
        )
    if isinstance(b, bool) or not isinstance(b, (int, float)):
        raise PolicyError(
            f"a budget is a float or an int, not {type(b).__name__}", where=where, hint="give budget=0.2 or budget=1024"
        )
    if isinstance(b, float) and not 0.0 < b <= 1.0:
        raise PolicyError(
            "a fractional budget lies above 0 and at most at 1.0",
            where=where,
            hint="budget=0.2 keeps a fifth; for slots give an int",
        )
    if isinstance(b, int) and b < 1:
        raise PolicyError("a budget of slots is at least 1", where=where, hint="give budget=1024")
    whole = isinstance(b, float) and b == 1.0  # 1.0 is everything, 1 is one slot
    if given and isinstance(own, float) and own == 1.0 and not whole:
        raise PolicyError(
            f"policy {p.name!r} keeps everything", where=where, hint="leave budget out, or choose an evicting policy"
        )
    smallest = b if isinstance(b, int) else p.min_slots
    protected = p.protect.sinks + recent_of(p, smallest)
    if not whole and protected > smallest:
        raise PolicyError(
            f"the budget can be as small as {smallest} slots, but {protected} are protected "
            f"(sinks {p.protect.sinks}, recent {p.protect.recent})",
            where=where,
            hint="raise the budget or min_slots, or protect less",
        )


def fraction(value: float) -> Fraction:
    """The nearest ratio with a denominator up to 65,536: budgets are then exact in integer arithmetic everywhere."""
    return Fraction(value).limit_denominator(65_536)


def recent_of(p: Policy, n: int) -> int:
    """Protected recent slots of a budget of n slots."""
    if isinstance(p.protect.recent, int):
        return p.protect.recent
    share = fraction(p.protect.recent)
    return n * share.numerator // share.denominator
