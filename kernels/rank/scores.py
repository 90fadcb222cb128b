"""Scores of keys: statistics -> how much each key deserves to stay. Pure torch on every device.

Owns score, scope, protection and pooling (docs/design/0001-state-and-kernels.md), shared by prefill, decode and
inspection. Selects nothing.
"""

from __future__ import annotations

import torch
from kvpass.kernels.attention.masks import check_shown
from kvpass.kernels.errors import MarkError
from kvpass.kernels.rank.allocate import budgets, head_counts, ragged_columns, table_counts, with_preference
from kvpass.kernels.rank.held import UNSCORED, Read, held_scores
from kvpass.kernels.rank.lone import as_in_steps, lone, stepped
from kvpass.kernels.rank.places import key_places, new_places, protected_places, side_by_side, slot_places
from kvpass.kernels.rank.rings import ringed
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rank.smooth import pooled
from kvpass.kernels.rank.weights import value_weights
from kvpass.kernels.rule import (
    DROP,
    EXTRA,
    FIRST,
    FREE,
    HELD,
    KEEP,
    LIVE,
    MARK,
    NUMBER,
    PLACE,
    RING,
    SEEN,
    SHIFT,
    UNTOUCHABLE,
    WEIGHT,
    Rule,
)
from torch import Tensor

INF = float("inf")


def score_slots(
    stats: Tensor,
    past_stats: Tensor | None,
    pos: Tensor | None,
    valid: Tensor,
    cursor: Tensor,
    position: int,
    rule: str,
    mask: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rows: Tensor | None = None,
    wo: Tensor | None = None,
    hidden: Tensor | None = None,
    marks: Tensor | None = None,
    queries: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every key after a multi-token call.

    stats: float32 [M, B, Hkv, L], what this call emitted (`rule.emitted`). past_stats: float32 [N, B, Hkv, L], what
    the slots kept (`rule.stats`; sums are added if `rule.carry`). pos: int32 [B, Hkv, L] in ascending order, -1 =
    empty, or None (key l is at position l). valid: bool [B, S], the last S keys'. cursor: int32 [B, Hkv, 4 or 6] before
    the call. position: of the call's first token. mask: of the attention, checked if there is a past. k, v
    [B, Hkv, L, D or Dv], rows (of `window_rows`), wo [out, Hq * Dv], hidden [B, S, size], queries [B, Hq, S, D] before
    their rotation and turns [2, 1 or B, S, D], its cosines and sines: for rules with a scorer or a value weight that
    reads them. marks: int32 [B, S], of the call's tokens, for rules that are `marked`.

    Returns (score float32 [B, Hkv, L]: +inf protected, 3e38 untouchable, -inf no candidate; the statistics to keep
    [N, B, Hkv, L]; the new cursor). Raises ValueError if stats do not fit the rule, MaskError as `check_shown`.
    """
    plan = Rule.parse(rule).of_call(position)
    if stats.dim() != 4 or stats.shape[0] != len(plan.emitted):
        raise ValueError(f"score_slots: stats must be [{len(plan.emitted)}, B, Hkv, L], got {list(stats.shape)}")
    if pos is not None:
        check_shown(mask, cursor[:, 0, SEEN], position)
    batch, heads, length = stats.shape[1:]
    candidate = _candidates(pos, valid, batch, heads, length)
    marked = _marks(marks, past_stats, candidate, plan) if MARK in plan.stats else None
    if marked is not None:
        candidate = candidate & (marked < DROP)
    where = key_places(pos, valid, cursor, past_stats, (batch, heads, length), plan)
    end = torch.where(candidate, where, -1).amax(-1, keepdim=True) + 1
    after = _advanced(cursor, valid, candidate, position, plan)
    order = _neighbours(valid, cursor, length, plan)
    stats = _by_number(stats, valid, cursor, position, plan)
    total = _attention_statistics(stats, past_stats, plan)
    if plan.pool != "none" and not plan.scorer:
        total[plan.stat("sum")] = pooled(total[plan.stat("sum")], where, candidate, end, plan, order)
    for name in {PLACE, NUMBER} & set(plan.stats):
        total[plan.stat(name)] = 0.0 if past_stats is None else past_stats[plan.stat(name)]
        total[plan.stat(name), ..., length - valid.shape[1] :] = new_places(valid, cursor).float()
    if marked is not None:
        total[plan.stat(MARK)] = marked
    if HELD in plan.stats:
        past_held = None if past_stats is None else past_stats[plan.stat(HELD)]
        total[plan.stat(HELD)], preferred = held_scores(
            stats,
            (where, candidate, end),
            after,
            Read(k, v, rows, hidden, queries, turns),
            (past_held, marked),
            (valid.shape[1], order),
            plan,
        )
        after = after if preferred is None else with_preference(after, preferred)
    if WEIGHT in plan.stats:
        assert v is not None
        old = length - valid.shape[1]  # their weights stay: a share of all heads needs the same token in each
        total[plan.stat(WEIGHT), ..., old:] = value_weights(plan.weight, v[:, :, old:], wo)
        if past_stats is not None:
            total[plan.stat(WEIGHT), ..., :old] = past_stats[plan.stat(WEIGHT), ..., :old]
    single = lone(valid, cursor, plan)
    if past_stats is not None:
        as_in_steps(total, past_stats, stats, (where, valid, single), plan)
    if not plan.evicts:
        return torch.where(candidate, INF, -INF), total, after
    if plan.spread:  # all candidates stay until all layers are known
        return torch.where(candidate, INF, -INF), total, after
    if plan.rings:
        return _in_rings(total, past_stats, where, candidate, valid.shape[1], (cursor, after), plan)
    if not plan.ragged:
        return ranked(total, where, candidate, end, after, plan), total, after
    extra = torch.where(single, cursor[..., EXTRA], 0)
    score = ranked(total, where, candidate, end, after, plan, extra)
    after = torch.where(single[..., None], stepped(cursor, after, plan), shared_by_heads(score, candidate, after, plan))
    return score, total, after


def _neighbours(valid: Tensor, cursor: Tensor, length: int, rule: Rule) -> Tensor | None:
    """The order of keys in which neighbours are looked at, as of `side_by_side`; None for theirs, or if nobody looks.

    A scorer's keys would have to be copied, so the device is asked before.
    """
    together = bool(rule.scorer) and not find_scorer(rule.scorer).pointwise
    if rule.pool == "none" and not together:
        return None
    return side_by_side(valid, cursor, length, look=together or valid.device.type == "cpu")


def _by_number(stats: Tensor, valid: Tensor, cursor: Tensor, position: int, rule: Rule) -> Tensor:
    """What was emitted, with `last` as a number among the row's valid tokens instead of a position."""
    if "last" not in rule.emitted:
        return stats
    at, stats = rule.emission("last"), stats.clone()
    number = (new_places(valid, cursor) + 1).float().expand(*stats.shape[1:3], -1)
    index = (stats[at].long() - 1 - position).clamp(min=0)
    stats[at] = torch.where(stats[at] > 0, number.gather(-1, index), 0.0)
    return stats


def _in_rings(
    stats: Tensor,
    past: Tensor | None,
    pos: Tensor,
    candidate: Tensor,
    new: int,
    cursors: tuple[Tensor, Tensor],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `score_slots` returns where slots are rings; `cursors`: before the call, and after it but for LIVE."""
    before, after = cursors
    rings = torch.zeros_like(stats[0]) if past is None else past[rule.stat(RING)].clone()
    size = budgets(after[..., SEEN], rule)[..., None]
    stay = ringed(slot_scores(stats, pos, rule), rings, candidate, new, size, before, rule)
    stats[rule.stat(RING)] = rings
    after = after.clone()
    after[..., LIVE] = after[..., FREE] = stay.sum(-1).int()
    return torch.where(stay, INF, -INF), stats, after


def _marks(marks: Tensor | None, past: Tensor | None, candidate: Tensor, rule: Rule) -> Tensor:
    """float32 [B, Hkv, L]"""
    out = torch.zeros_like(candidate, dtype=torch.float32)
    if past is not None:
        out.copy_(past[rule.stat(MARK)])
    if marks is not None:
        out[..., out.shape[-1] - marks.shape[1] :] = marks[:, None].float()
    return out


def must_stay(stats: Tensor, rule: Rule) -> Tensor:
    """Slots that the caller said to keep: bool [B, Hkv, C]."""
    return stats[rule.stat(MARK)] >= KEEP


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


def _attention_statistics(stats: Tensor, past: Tensor | None, rule: Rule) -> Tensor:
    """What the slots keep of what was emitted, float32 [N, B, Hkv, L]; rows that are no statistics of attention are
    left undefined.
    """
    if rule.emitted == rule.stats and "last" not in rule.stats:
        return stats + past if past is not None and rule.carry else stats.clone()
    total = stats.new_empty(len(rule.stats), *stats.shape[1:])
    for at, name in enumerate(rule.stats):
        if name in rule.emitted:
            total[at] = stats[rule.emitted.index(name)]
            if past is not None and rule.carry:
                total[at] = torch.maximum(total[at], past[at]) if name == "last" else total[at] + past[at]
    return total


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


def _candidates(pos: Tensor | None, valid: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """Keys that may stay: used past slots and valid new tokens. Bool [B, Hkv, L]."""
    new = valid[:, None, :].expand(batch, heads, valid.shape[1])
    if pos is None:
        return new
    return torch.cat([pos[..., : length - valid.shape[1]] >= 0, new], -1)


def _advanced(cursor: Tensor, valid: Tensor, candidate: Tensor, position: int, rule: Rule) -> Tensor:
    """The cursor after the call: int32 [B, Hkv, 4]."""
    seen = cursor[..., SEEN] + valid.sum(-1)[:, None]
    arrived = position + valid.int().argmax(-1)
    first = torch.where(valid.any(-1), arrived, -1)[:, None]
    first = torch.where(cursor[..., FIRST] >= 0, cursor[..., FIRST], first)
    live = candidate.sum(-1)
    live = live if rule.spread else torch.minimum(budgets(seen, rule), live)
    columns = {LIVE: live, FREE: live, SEEN: seen, FIRST: first}
    if rule.ragged:
        columns |= {EXTRA: torch.zeros_like(live), SHIFT: torch.zeros_like(live)}
    return torch.stack([columns[c].int() for c in range(rule.columns)], -1)


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
    """Scores with scope and protection: float32 [B, Hkv, L]. where: places of the keys (rank/places.py); end:
    one past the last candidate's; extra: what heads may hold above the even budget, [B, Hkv].
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
