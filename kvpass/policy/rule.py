"""Policy -> Rule: the plain numbers that the ops take. A rule that can never evict observes nothing."""

from __future__ import annotations

from kvpass.kernels.rule import Rule
from kvpass.policy.check import fraction
from kvpass.policy.spec import Policy


def rule_of(policy: Policy) -> Rule:
    """The rule of a policy with a checked budget."""
    if policy.budget == 1.0 and isinstance(policy.budget, float):
        return Rule()
    share = fraction(policy.budget) if isinstance(policy.budget, float) else None
    recent = fraction(policy.protect.recent) if isinstance(policy.protect.recent, float) else None
    scope = fraction(policy.scope)
    return Rule(
        stats=policy.statistic.keep,
        queries=-1 if policy.observe.queries == "all" else policy.observe.queries,
        group=policy.observe.group,
        heads=policy.observe.heads,
        carry=policy.statistic.across_calls == "add",
        decode=policy.statistic.decode if policy.statistic.keep else "none",
        pool=policy.pool.kind if policy.pool else "none",
        pool_size=policy.pool.size if policy.pool else 1,
        score=policy.score,
        scope_num=scope.numerator,
        scope_den=scope.denominator,
        sinks=policy.protect.sinks,
        recent=policy.protect.recent if isinstance(policy.protect.recent, int) else 0,
        recent_num=recent.numerator if recent else 0,
        recent_den=recent.denominator if recent else 1,
        slots=0 if share else int(policy.budget or 0),
        num=share.numerator if share else 1,
        den=share.denominator if share else 1,
        floor=policy.min_slots if share else 1,
    )
