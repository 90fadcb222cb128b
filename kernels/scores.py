"""Scores of keys: statistics -> how much each key deserves to stay. Pure torch on every device.

Owns score, scope, protection and pooling (docs/design/0001-state-and-kernels.md), shared by prefill, decode and
inspection. Selects nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kvpass.kernels.masks import check_shown
from kvpass.kernels.rule import FIRST, FREE, LIVE, SEEN, UNTOUCHABLE, Rule
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every key after a multi-token call.

    stats, past_stats: float32 [N, B, Hkv, L] of this call and of the past (added if `rule.carry`). pos: int32
    [B, Hkv, L] in ascending order, -1 = empty, or None (key l is at position l). valid: bool [B, S], the last S keys'.
    cursor: int32 [B, Hkv, 4] before the call. position: of the call's first token. mask: of the
    attention, checked if there is a past.

    Returns (score float32 [B, Hkv, L]: +inf protected, 3e38 untouchable, -inf no candidate; the statistics to keep;
    the new cursor). Raises ValueError if stats do not fit the rule, MaskError as `check_shown`.
    """
    plan = Rule.parse(rule)
    if stats.dim() != 4 or stats.shape[0] != len(plan.stats):
        raise ValueError(f"score_slots: stats must be [{len(plan.stats)}, B, Hkv, L], got {list(stats.shape)}")
    if pos is not None:
        check_shown(mask, cursor[:, 0, SEEN], position)
    batch, heads, length = stats.shape[1:]
    candidate = _candidates(pos, valid, batch, heads, length)
    where = _positions(pos, length, stats.device).expand(batch, heads, length)
    end = torch.where(candidate, where, -1).amax(-1, keepdim=True) + 1
    total = stats + past_stats if past_stats is not None and plan.carry else stats
    if plan.pool != "none":
        total = _pooled(total, where, candidate, end, plan)
    after = _advanced(cursor, valid, candidate, position, plan)
    if not plan.evicts:
        return torch.where(candidate, INF, -INF), _fresh(total, stats), after
    score = _ranked(total, where, candidate, end, after, plan)
    return score, _fresh(total, stats), after


def slot_scores(stats: Tensor, pos: Tensor, rule: Rule) -> Tensor:
    """Raw scores, before scope and protection: float32, the shape of pos.

    stats float32 [N, B, Hkv, C], pos int [B, Hkv, C]. Empty slots get whatever their undefined statistics give.
    """
    if rule.score == "position":
        return pos.float()
    total = stats[rule.stat("sum")]
    return total if rule.score == "sum" else total / stats[rule.stat("count")].clamp(min=1)


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


def budget(seen: Tensor, rule: Rule) -> Tensor:
    """`rule.budget` for a tensor of seen counts, in int64."""
    if rule.slots > 0:
        return torch.full_like(seen, rule.slots, dtype=torch.int64)
    return (seen.long() * rule.num // rule.den).clamp(min=rule.floor)


def _positions(pos: Tensor | None, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=device) if pos is None else pos


def _candidates(pos: Tensor | None, valid: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """Keys that may stay: used past slots and valid new tokens. Bool [B, Hkv, L]."""
    new = valid[:, None, :].expand(batch, heads, valid.shape[1])
    if pos is None:
        return new
    return torch.cat([pos[..., : length - valid.shape[1]] >= 0, new], -1)


def _pooled(stats: Tensor, pos: Tensor, candidate: Tensor, end: Tensor, rule: Rule) -> Tensor:
    """The statistics with `sum` smoothed over neighbours; keys outside the pool keep their raw sums (SnapKV)."""
    row = rule.stat("sum")
    pooled = candidate & (pos < end - max(rule.queries, 0))
    raw = stats[row]
    inside = torch.where(pooled, raw, 0.0)
    pad = rule.pool_size // 2
    if rule.pool == "avg":
        smooth = F.avg_pool1d(inside, rule.pool_size, 1, pad)
    else:  # sums are never negative, so max_pool's -inf padding and zero padding agree
        smooth = F.max_pool1d(inside, rule.pool_size, 1, pad)
    rows = [torch.where(pooled, smooth, raw) if i == row else stats[i] for i in range(len(rule.stats))]
    return torch.stack(rows)


def _advanced(cursor: Tensor, valid: Tensor, candidate: Tensor, position: int, rule: Rule) -> Tensor:
    """The cursor after the call: int32 [B, Hkv, 4]."""
    seen = cursor[..., SEEN] + valid.sum(-1)[:, None]
    arrived = position + valid.int().argmax(-1)
    first = torch.where(valid.any(-1), arrived, -1)[:, None]
    first = torch.where(cursor[..., FIRST] >= 0, cursor[..., FIRST], first)
    live = torch.minimum(budget(seen, rule), candidate.sum(-1))
    columns = {LIVE: live, FREE: live, SEEN: seen, FIRST: first}
    return torch.stack([columns[c].int() for c in range(4)], -1)


def _ranked(stats: Tensor, pos: Tensor, candidate: Tensor, end: Tensor, cursor: Tensor, rule: Rule) -> Tensor:
    """Scores with scope and protection: float32 [B, Hkv, L]."""
    score = slot_scores(stats, pos, rule)
    if rule.heads == "all" and rule.score != "position":
        score = score.mean(1, keepdim=True).expand_as(score)
    size = budget(cursor[..., SEEN], rule)[..., None]
    recent = rule.recent + size * rule.recent_num // rule.recent_den
    protected = pos >= end - recent
    if rule.sinks:
        protected = protected | (pos < cursor[..., FIRST, None] + rule.sinks)
    protected = protected & candidate
    if rule.scope_num:
        reach = size * rule.scope_num // rule.scope_den + 1
        spread = deviations(stats, rule).masked_fill(protected, INF).masked_fill(~candidate, -INF)
        score = score.masked_fill(untouchable(spread, pos, reach), UNTOUCHABLE)
    return score.masked_fill(protected, INF).masked_fill(~candidate, -INF)


def _fresh(value: Tensor, argument: Tensor) -> Tensor:
    """An op must not return its argument: torch.library forbids undeclared aliases."""
    return value.clone() if value is argument else value
