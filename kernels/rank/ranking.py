"""How slots rank: statistics that are kept per slot -> scores, with scope and protection. Pure torch on every device.

Used by whatever evicts or shows scores: the op for calls of several tokens (rank/scores.py), a decode step, layers
that share out, reports. Selects nothing.
"""

from __future__ import annotations

import torch
from kvpass.kernels.errors import MarkError
from kvpass.kernels.rank.allocate import budgets, head_counts, ragged_columns, table_counts
from kvpass.kernels.rank.held import UNSCORED
from kvpass.kernels.rank.places import protected_places, slot_places
from kvpass.kernels.rule import (
    EXTRA,
    FREE,
    HELD,
    KEEP,
    LIVE,
    MARK,
    NUMBER,
    SEEN,
    SHIFT,
    UNTOUCHABLE,
    WEIGHT,
    Rule,
)
from torch import Tensor

INF = float("inf")


def must_stay(stats: Tensor, rule: Rule) -> Tensor:
    """Slots that the caller said to keep: bool [B, Hkv, C]."""
    return stats[rule.stat(MARK)] >= KEEP


def newest(cursor: Tensor) -> Tensor:
    """Number of each row's latest token among its valid ones: int32 [B, 1, 1], what `slot_scores` takes as `now`."""
    return cursor[:, :1, SEEN, None] - 1


def slot_scores(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int = 0) -> Tensor:
    """Raw scores, before scope and protection: float32, the shape of pos.

    stats float32 [N, B, Hkv, C], pos int [B, Hkv, C]; now: number of the row's latest token among its valid ones, for
    scores that decay. Empty slots get whatever their undefined statistics give.
    """
    score = base_scores(stats, pos, rule, now)
    if rule.heads == "all" and rule.score not in ("position", HELD):
        score = score.mean(1, keepdim=True).expand_as(score)
    if WEIGHT not in rule.stats:
        return score
    weighted = (score + rule.weight_floor) * stats[rule.stat(WEIGHT)]
    return torch.where(score >= UNSCORED, score, weighted) if HELD in rule.stats else weighted


def base_scores(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int) -> Tensor:
    """Scores of each head before any value weight, the shape of pos. TRIM-KV's are log-retentions that count once for
    each token since (arXiv 2512.03324).
    """
    if rule.score == "position":
        return pos.float()
    if rule.score == "mean":
        return stats[rule.stat("sum")] / stats[rule.stat("count")].clamp(min=1)
    if rule.score == "important":
        return stats[rule.stat("important")] / stats[rule.stat("count")].clamp(min=1)
    if rule.score == "last":
        return stats[rule.stat("last")] - 1 - now
    score = stats[rule.stat(rule.score)]
    return score * (now - (stats[rule.stat(NUMBER)] if NUMBER in rule.stats else pos)) if rule.decay else score


def deviations(stats: Tensor, rule: Rule) -> Tensor:
    """Standard deviation of each slot's observed probabilities (RoCo, arXiv 2402.06262): float32 [B, Hkv, C].

    The variance is clamped at 0, where rounding can make it negative.
    """
    count = stats[rule.stat("count")].clamp(min=1)
    mean = stats[rule.stat("sum")] / count
    return (stats[rule.stat("sumsq")] / count - mean * mean).clamp(min=0).sqrt()


def ordered(value: Tensor, pos: Tensor) -> Tensor:
    """int64 keys that sort by value, equal values by age: the older (smaller position) gets the larger key.

    value float32, pos int, same shape. One integer holds both, so sorts and minima need no second pass for ties.
    """
    bits = (value + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0, else two zeros would differ
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) - pos


def untouchable(spread: Tensor, pos: Tensor, size: Tensor | int) -> Tensor:
    """Bool, the shape of pos: the `size` slots with the largest spread, ties older.

    spread float32 [B, Hkv, L]: `deviations`, protected slots raised to +inf, empties at -inf. size: an int, or int64
    [B, Hkv, 1].
    """
    if isinstance(size, int):
        size = min(size, spread.shape[-1])
        kept = spread >= spread.topk(size, -1, sorted=False).values.amin(-1, keepdim=True)
        if int(kept.count_nonzero()) == kept.shape[0] * kept.shape[1] * size:  # else the last place is shared
            return kept
    key = ordered(spread, pos)
    best = key.sort(-1, descending=True).values
    if isinstance(size, int):
        return key >= best[..., size - 1, None]
    return key >= best.gather(-1, (size - 1).clamp(0, spread.shape[-1] - 1))


def shared_by_heads(score: Tensor, candidate: Tensor, cursor: Tensor, rule: Rule) -> Tensor:
    """The cursor with the layer's slots shared out over its heads."""
    size = budgets(cursor[..., SEEN], rule)[..., None]
    if rule.table:
        counts = table_counts(candidate, size, (score == INF).sum(-1, keepdim=True), rule)
    else:
        counts = head_counts(score, candidate, size, rule)
    columns = {LIVE: counts, FREE: counts} | dict(zip((EXTRA, SHIFT), ragged_columns(counts, size), strict=True))
    cursor = cursor.clone()
    for column, value in columns.items():
        cursor[..., column] = value.int()
    return cursor


def ranked(
    stats: Tensor,
    where: Tensor,
    candidate: Tensor,
    end: Tensor,
    cursor: Tensor,
    rule: Rule,
    extra: Tensor | int = 0,
) -> Tensor:
    """Scores with scope and protection: float32 [B, Hkv, L]. where: places of the keys (rank/places.py); end: one
    past the last candidate's; extra: what heads may hold above the even budget, [B, Hkv].
    """
    score = slot_scores(stats, where, rule, end - 1)
    size = (budgets(cursor[..., SEEN], rule) + extra)[..., None]
    recent = rule.recent + size * rule.recent_num // rule.recent_den
    if rule.spread == "threshold":  # a budget that is only a bound may be smaller than the window: half of it, then
        recent = torch.minimum(recent, (size - rule.sinks) // 2)
    protected = protected_places(where, end, recent, rule.sinks) & candidate
    if rule.marked:
        wanted = must_stay(stats, rule) & candidate
        _check_marks(wanted, size)
        protected = protected | wanted
    if rule.scope_num or rule.top_num:
        reach = size * rule.top_num // rule.top_den if rule.top_num else size * rule.scope_num // rule.scope_den + 1
        spread = preference(stats, where, rule, end - 1).masked_fill(protected, INF).masked_fill(~candidate, -INF)
        score = score.masked_fill(untouchable(spread, where, reach) & (reach > 0), UNTOUCHABLE)
    return score.masked_fill(protected, INF).masked_fill(~candidate, -INF)


def state_scores(state: list[Tensor], rule: Rule) -> Tensor:
    """`ranked` of what a state (k, v, pos, stats, cursor) holds between calls, heads equally long and slots in the
    order of positions: -inf empty.
    """
    _, _, pos, stats, cursor = state
    where = slot_places(pos, cursor, stats, rule)
    return ranked(stats, where, pos >= 0, where.amax(-1, keepdim=True) + 1, cursor, rule)


def preference(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int) -> Tensor:
    """What decides which slots are untouchable: the deviation (RoCo), or the score before its weight (CriticalKV)."""
    return base_scores(stats, pos, rule, now) if rule.top_num else deviations(stats, rule)


def _check_marks(wanted: Tensor, size: Tensor) -> None:
    """Raises MarkError if more tokens must stay than there is room for; on a GPU the device asserts it."""
    counts = wanted.sum(-1, keepdim=True)
    good = (counts <= size).all()
    if good.device.type != "cpu":
        torch._assert_async(good, "more tokens are marked to be kept than the budget holds")
    elif not bool(good):
        raise MarkError(
            f"{int(counts.max())} tokens are marked to be kept, but the budget holds {int(size.min())}",
            "mark fewer tokens, or raise the budget",
        )
