"""How slots rank: statistics that are kept per slot -> scores, with scope and protection. Pure torch on every device.

Used by whatever evicts or shows scores: the op for calls of several tokens (rank/scores.py), a decode step, layers
that share out, reports. Selects nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.budget import budget, part, smaller
from kvpass.kernels.rank.allocate import Heads, head_counts, ragged_columns, table_counts
from kvpass.kernels.rank.criterion import INF, SCORED, UNTOUCHABLE, Ranking, Scope
from kvpass.kernels.rank.marks import Marks, check_marks, must_stay
from kvpass.kernels.rank.places import NUMBER, Protected, protected_places, slot_places
from kvpass.kernels.rank.scored import UNSCORED, Scoring
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.weights import WEIGHT, Weight
from kvpass.kernels.ranks import gathered
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FREE, LIVE, SEEN, SHIFT
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor


def newest(cursor: Tensor) -> Tensor:
    """Number of each row's latest token among its valid ones: int32 [B, 1, 1], what `slot_scores` takes as `now`."""
    return cursor[:, :1, SEEN, None] - 1


def slot_scores(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int = 0) -> Tensor:
    """Raw scores, before scope and protection: float32, the shape of pos.

    stats float32 [N, B, Hkv, C], pos int [B, Hkv, C]; now: number of the row's latest token among its valid ones, for
    scores that decay. Empty slots get whatever their undefined statistics give.
    """
    score = base_scores(stats, pos, rule, now)
    if rule[Ranking].together:
        score = gathered(score, rule).mean(1, keepdim=True).expand_as(score)
    if not keeps(rule, WEIGHT):
        return score
    weighted = (score + rule[Weight].weight_floor) * stats[stat(rule, WEIGHT)]
    return torch.where(score >= UNSCORED, score, weighted) if keeps(rule, SCORED) else weighted


def base_scores(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int) -> Tensor:
    """Scores of each head before any value weight, the shape of pos. TRIM-KV's are log-retentions that count once for
    each token since (arXiv 2512.03324).
    """
    by = rule[Ranking].score
    if by == "position":
        return pos.float()
    if by == "mean":
        return stats[stat(rule, "sum")] / stats[stat(rule, "count")].clamp(min=1)
    if by == "important":
        return stats[stat(rule, "important")] / stats[stat(rule, "count")].clamp(min=1)
    if by == "last":
        return stats[stat(rule, "last")] - 1 - now
    score = stats[stat(rule, by)]
    return score * (now - (stats[stat(rule, NUMBER)] if keeps(rule, NUMBER) else pos)) if rule[Scoring].decay else score


def deviations(stats: Tensor, rule: Rule) -> Tensor:
    """Standard deviation of each slot's observed probabilities (RoCo, arXiv 2402.06262): float32 [B, Hkv, C].

    The variance is clamped at 0, where rounding can make it negative.
    """
    count = stats[stat(rule, "count")].clamp(min=1)
    mean = stats[stat(rule, "sum")] / count
    return (stats[stat(rule, "sumsq")] / count - mean * mean).clamp(min=0).sqrt()


def ordered(value: Tensor, pos: Tensor) -> Tensor:
    """int64 keys that sort by value, equal values by age: the older (smaller position) gets the larger key.

    value float32, pos int, same shape. One integer holds both, so sorts and minima need no second pass for ties.
    """
    bits = (value + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0, else two zeros would differ
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) - pos


def untouchable(deviation: Tensor, pos: Tensor, size: Tensor | int) -> Tensor:
    """Bool, the shape of pos: the `size` slots with the largest deviation, ties older.

    deviation float32 [B, Hkv, L]: `deviations`, protected slots raised to +inf, empties at -inf. size: an int, or int64
    [B, Hkv, 1].
    """
    if isinstance(size, int):
        size = min(size, deviation.shape[-1])
        kept = deviation >= deviation.topk(size, -1, sorted=False).values.amin(-1, keepdim=True)
        if int(kept.count_nonzero()) == kept.shape[0] * kept.shape[1] * size:  # else the last place is shared
            return kept
    key = ordered(deviation, pos)
    best = key.sort(-1, descending=True).values
    if isinstance(size, int):
        return key >= best[..., size - 1, None]
    return key >= best.gather(-1, (size - 1).clamp(0, deviation.shape[-1] - 1))


def counts_of_heads(score: Tensor, candidate: Tensor, size: Tensor, rule: Rule) -> Tensor:
    """How many slots each head of a layer gets, by a table or by score: int64 [B, Hkv], of all heads of the layer."""
    if rule[Heads].table:
        return table_counts(candidate, size, (score == INF).sum(-1, keepdim=True), rule)
    return head_counts(score, candidate, size, rule)


def shared_by_heads(score: Tensor, candidate: Tensor, cursor: Tensor, rule: Rule) -> Tensor:
    """The cursor with the layer's slots shared out over its heads."""
    size = budget(rule, cursor[..., SEEN])[..., None]
    counts = counts_of_heads(score, candidate, size, rule)
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
    size = (budget(rule, cursor[..., SEEN]) + extra)[..., None]
    protected = protected_places(where, end, recent_of(rule, size), rule[Protected].sinks) & candidate
    if rule[Marks].marked:
        wanted = must_stay(stats, rule) & candidate
        check_marks(wanted, size)
        protected = protected | wanted
    reach = reach_of(rule, size)
    if reach is not None:
        deviation = preference(stats, where, rule, end - 1).masked_fill(protected, INF).masked_fill(~candidate, -INF)
        score = score.masked_fill(untouchable(deviation, where, reach) & (reach > 0), UNTOUCHABLE)
    return score.masked_fill(protected, INF).masked_fill(~candidate, -INF)


def recent_of(rule: Rule, size: Any) -> Any:
    """Recent tokens that are protected under a budget of `size` slots, an int or an int64 tensor. A budget that is only
    a bound may be smaller than the window: half of it, then.
    """
    recent = rule[Protected].window(size)
    if rule[ShareOut].share != "threshold":
        return recent
    return smaller((size - rule[Protected].sinks) // 2, recent)


def reach_of(rule: Rule, size: Any) -> Any:
    """How many slots the scope, or a score before its weight, keeps out of reach under a budget of `size` slots; None
    without either.
    """
    top, scope = rule[Weight], rule[Scope]
    if top.top_num:
        return part(size, top.top_num, top.top_den)
    return part(size, scope.scope_num, scope.scope_den) + 1 if scope.scope_num else None


def state_scores(state: State, rule: Rule) -> Tensor:
    """`ranked` of what a state holds between calls, heads equally long and slots in the order of positions: -inf
    empty.
    """
    where = slot_places(state.pos, state.cursor, state.stats, rule)
    return ranked(state.stats, where, state.pos >= 0, where.amax(-1, keepdim=True) + 1, state.cursor, rule)


def preference(stats: Tensor, pos: Tensor, rule: Rule, now: Tensor | int) -> Tensor:
    """What decides which slots are untouchable: the deviation (RoCo), or the score before its weight (CriticalKV)."""
    return base_scores(stats, pos, rule, now) if rule[Weight].top_num else deviations(stats, rule)
