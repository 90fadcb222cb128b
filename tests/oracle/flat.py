"""One budget for all KV heads of a layer (Ada-KV): how many slots each head gets of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from oracle.choice import Choice, objection

Array = np.ndarray


def ranking(choice: Choice) -> list[tuple[int, float, int]]:
    """(tier, -score, position) of every candidate; the smallest are kept first."""
    scope = choice.in_scope()
    tier = np.where(choice.protected, 0, np.where(scope, 1, 2))
    score = np.where(tier < 2, 0, choice.score)  # protected ones are alike
    return [(int(t), -float(s), int(p)) for t, s, p in zip(tier, score, choice.positions, strict=True)]


def safe_slots(even: int, safeguard: Fraction) -> int:
    return max(1, even * safeguard.numerator // safeguard.denominator)


def counts(choices: list[Choice], even: int, safeguard: Fraction) -> list[int]:
    """Slots of each head: the best `safe` of each, then the layer's best; ties go to the older, then the lower
    head."""
    entries = []
    for head, choice in enumerate(choices):
        for place, key in enumerate(sorted(ranking(choice))):
            entries.append((place >= safe_slots(even, safeguard), *key, head))
    kept = sorted(entries)[: even * len(choices)]
    return [sum(entry[-1] == head for entry in kept) for head in range(len(choices))]


def by_table(choices: list[Choice], even: int, shares: Array) -> list[int]:
    """Slots of each head: the protected ones and one more, then its share of the rest; what rounding leaves goes to
    the largest fractions, the lower head first."""
    least = [min(int(choice.protected.sum()) + 1, even) for choice in choices]
    rest = (even * len(choices) - sum(least)) * shares / shares.sum()
    whole = np.floor(rest).astype(int)
    order = sorted(range(len(choices)), key=lambda h: (-(rest[h] - whole[h]), h))
    for h in order[: round(rest.sum()) - whole.sum()]:
        whole[h] += 1
    return [min(a + int(b), len(c.positions)) for a, b, c in zip(least, whole, choices, strict=True)]


def extras(kept: list[int], even: int) -> list[int]:
    """Slots beyond the even budget, as long as the budget binds anywhere."""
    return [count - even if max(kept) > even else 0 for count in kept]


def joint_objection(
    choices: list[Choice], theirs: list[Array], even: int, safeguard: Fraction, rtol: float
) -> str | None:
    """Why float32 cannot have shared out a layer's budget as `theirs` did: each head must keep its own best, and no
    head may hold a slot beyond its safe ones that is clearly worse than what another head gave up."""
    total, most = sum(len(t) for t in theirs), sum(len(c.positions) for c in choices)
    if total != min(even * len(choices), most):
        return f"the heads keep {total} slots together, not {min(even * len(choices), most)}"
    safe = safe_slots(even, safeguard)
    worst_kept, best_lost = [], []
    for head, (choice, held) in enumerate(zip(choices, theirs, strict=True)):
        if len(held) < min(safe, len(choice.positions)):
            return f"head {head} keeps {len(held)} slots, {safe} are safe"
        choice.keep = len(held)
        why = objection(choice, held, rtol)
        if why:
            return f"head {head}: {why}"
        low, high = choice.bounds(rtol)
        kept, tiers = np.isin(choice.positions, held), np.array([key[0] for key in ranking(choice)])
        if len(held) > safe:
            worst_kept.append((min((-tiers[i], high[i] * (tiers[i] == 2)) for i in np.flatnonzero(kept)), head))
        if (~kept).any():
            best_lost.append((max((-tiers[i], low[i] * (tiers[i] == 2)) for i in np.flatnonzero(~kept)), head))
    for lost, giver in best_lost:
        for worst, taker in worst_kept:
            if taker != giver and worst < lost:
                return f"head {giver} gives up (tier, score) {lost}, head {taker} keeps {worst}"
    return None
