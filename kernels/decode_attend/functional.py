"""decode_attend as a pure function of tensors: what a tracer takes apart and a compiler lowers.

No Python branch looks at a tensor, nothing is written in place, and there is no sort, scatter or argmin: slots are
picked by comparison, so that the whole step is elementwise operations, reductions and two matrix products. It reads
and copies all slots, so it is the form for other compilers, not the fast path of torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpass.kernels.attention.masks import by_kv_head, visible
from kvpass.kernels.rank.ranking import deviations, slot_scores
from kvpass.kernels.rule import FIRST, FREE, LIVE, SEEN, UNTOUCHABLE, Rule
from torch import Tensor

INF = float("inf")


def decode_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    stats: Tensor,
    cursor: Tensor,
    position: int,
    scale: float,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kvpass.kernels.decode_attend.decode_attend` without mutation.

    Arguments as there. sinks: float [Hq], one more logit per query head in the softmax's denominator. softcap: above
    0, logits become `softcap * tanh(logits / softcap)` before the mask.

    Returns (out [B, Hq, 1, Dv] in q's dtype, then k, v, pos, stats and cursor after the token, none of them an
    argument). Raises ValueError for a rule that does not fit the number of statistics.
    """
    plan = Rule.parse(rule)
    if stats.shape[0] != len(plan.stats):
        raise ValueError(f"decode_step: the rule keeps {len(plan.stats)} statistics, got {stats.shape[0]}")
    now = torch.scalar_tensor(position, dtype=torch.int32, device=pos.device)
    arrived = _arrived(mask, position, q)
    slot = torch.arange(pos.shape[2], dtype=torch.int32, device=pos.device)
    here = (slot == _column(cursor, FREE)) & arrived
    k, v = torch.where(here[..., None], k_new, k), torch.where(here[..., None], v_new, v)
    pos = torch.where(here, now, pos)
    stats = torch.where(here, 0.0, stats)
    shown, bias = _shown(mask, pos)
    probs = _probabilities(q, k, shown, bias, scale, sinks, softcap)
    values = torch.where((pos >= 0)[..., None], v.float(), 0.0)  # 0 times an undefined value may be NaN
    out = (probs @ values).to(q.dtype).reshape(*q.shape[:3], v.shape[3])
    stats = _observed(stats, probs, shown.any(2) & arrived, arrived, plan)
    pos, cursor = _settled(pos, stats, cursor, now, arrived, plan)
    return out, k, v, pos, stats, cursor


def _column(cursor: Tensor, at: int) -> Tensor:
    return cursor[..., at : at + 1]


def _arrived(mask: Tensor | None, position: int, q: Tensor) -> Tensor:
    """Bool, broadcastable to [B, 1, 1]: is the row's token valid, that is, visible to its own query in some head."""
    if mask is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=q.device)
    own = mask if _is_column(mask) else mask.narrow(-1, position, 1)
    return visible(own).any(1)


def _is_column(mask: Tensor) -> bool:
    """One column for all positions. A traced width is none, and asking would rule out the step at position 0."""
    return isinstance(mask.shape[-1], int) and mask.shape[-1] == 1


def _shown(mask: Tensor | None, pos: Tensor) -> tuple[Tensor, Tensor | None]:
    """What each query head may see: bool [B, Hkv, 1 or G, C]; and what a float mask adds to the logits, or None."""
    used = (pos >= 0)[:, :, None]
    if mask is None:
        return used, None
    grouped = by_kv_head(mask, pos.shape[1])[..., 0, :]
    if not _is_column(mask):
        index = pos.clamp(min=0).long()[:, :, None]
        shape = (*pos.shape[:2], grouped.shape[2], pos.shape[2])
        grouped = grouped.expand(*shape[:3], mask.shape[-1]).gather(-1, index.expand(shape))
    return visible(grouped) & used, None if mask.dtype == torch.bool else grouped.float()


def _probabilities(
    q: Tensor, k: Tensor, shown: Tensor, bias: Tensor | None, scale: float, sinks: Tensor | None, softcap: float
) -> Tensor:
    """float32 [B, Hkv, G, C], 0 where a slot is hidden or empty, all 0 in rows that see nothing."""
    batch, heads = k.shape[:2]
    queries = (q.float() * scale).reshape(batch, heads, q.shape[1] // heads, q.shape[3])
    logits = queries @ k.float().transpose(-1, -2)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    logits = torch.where(shown, logits, -INF)
    top = logits.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.float().reshape(1, heads, -1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(top > -INF, top, 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return weights / torch.where(total > 0, total, 1.0)


def _observed(stats: Tensor, probs: Tensor, seen: Tensor, arrived: Tensor, plan: Rule) -> Tensor:
    """Statistics after this query's row, reduced over the group; seen: bool [B, Hkv, C]."""
    if not plan.stats or plan.decode == "none":
        return stats
    row = probs.mean(2) if plan.group == "mean" else probs.amax(2)
    added = torch.stack([{"sum": row, "sumsq": row * row, "count": seen.float()}[name] for name in plan.stats])
    after = added if plan.decode == "replace" else stats + added
    return torch.where(arrived, after, stats)


class _Choice(NamedTuple):
    """What the victims are picked from, all after the token has arrived."""

    pos: Tensor
    """int32 [B, Hkv, C]"""
    used: Tensor
    """bool [B, Hkv, C]"""
    size: Tensor
    """int32 [B, Hkv, 1], the budget."""
    first: Tensor
    """int32 [B, Hkv, 1]"""
    now: Tensor
    """int32 []"""
    seen: Tensor
    """int32 [B, Hkv, 1]: valid tokens, this one too."""


def _settled(
    pos: Tensor, stats: Tensor, cursor: Tensor, now: Tensor, arrived: Tensor, plan: Rule
) -> tuple[Tensor, Tensor]:
    """Positions and cursor after evicting one slot in each head that is over its budget."""
    live, free, seen, first = (_column(cursor, at) for at in (LIVE, FREE, SEEN, FIRST))
    seen = seen + arrived.int()
    first = torch.where(arrived & (first < 0), now, first)
    size = _budget(seen, plan)
    grows = arrived if not plan.evicts else arrived & (live + 1 <= size)
    grown = live + grows.int()
    if plan.evicts:
        gone = _victim(stats, _Choice(pos, pos >= 0, size, first, now, seen), plan) & (arrived & ~grows)
        slot = torch.arange(pos.shape[2], dtype=torch.int32, device=pos.device)
        hole = torch.where(gone, slot, 0).amax(-1, keepdim=True)
        free = torch.where(arrived & ~grows, hole, free)
        pos = torch.where(gone, -1, pos)
    free = torch.where(grows, grown, free)
    columns = {LIVE: grown, FREE: free, SEEN: seen, FIRST: first}
    return pos, torch.cat([columns[at].int() for at in range(4)], -1)


def _budget(seen: Tensor, plan: Rule) -> Tensor:
    """`Rule.budget` of int32 [B, Hkv, 1]; in int64 on the way, because seen * num may not fit."""
    if plan.slots > 0:
        return torch.full_like(seen, plan.slots)
    return torch.div(seen.long() * plan.num, plan.den, rounding_mode="trunc").clamp(min=plan.floor).int()


def _share(size: Tensor, num: int, den: int) -> Tensor:
    """floor(size * num / den), int32."""
    return torch.div(size.long() * num, den, rounding_mode="trunc").int()


def _victim(stats: Tensor, choice: _Choice, plan: Rule) -> Tensor:
    """The slot that each head would give up: bool [B, Hkv, C], one True. Lowest score, ties evict the newer."""
    pos, used, size = choice.pos, choice.used, choice.size
    score = slot_scores(stats, pos, plan)
    protected = _protected(choice, plan)
    if plan.scope_num:
        spread = torch.where(protected, INF, deviations(stats, plan))
        reach = _share(size, plan.scope_num, plan.scope_den) + 1
        score = torch.where(_untouchable(spread, pos, used, reach), UNTOUCHABLE, score)
    score = torch.where(used & ~protected, score, INF)
    lowest = used & (score == score.amin(-1, keepdim=True))
    newest = torch.where(lowest, pos, -1).amax(-1, keepdim=True)
    return used & (pos == newest)


def _protected(choice: _Choice, plan: Rule) -> Tensor:
    """Slots of the first and of the last tokens: bool [B, Hkv, C]. Where padding stands between tokens positions do not
    count them; the slots of both windows are all in use, so their ranks do.
    """
    pos, used, size, first, now, seen = choice
    parted = now - first + 1 > seen
    protected = pos < 0
    if plan.recent or plan.recent_num:
        recent = plan.recent + _share(size, plan.recent_num, plan.recent_den)
        young = torch.where(parted, _nth_largest(pos, used, recent), now - recent + 1)
        protected = protected | (pos >= young)
    if plan.sinks:
        count = used.int().sum(-1, keepdim=True) - plan.sinks
        old = torch.where(parted, _nth_largest(pos, used, count + 1), first + plan.sinks - 1)
        protected = protected | (pos <= old)
    return protected


def _nth_largest(pos: Tensor, used: Tensor, n: Tensor) -> Tensor:
    """Of the used slots' positions, int32 [B, Hkv, 1]; 0 if there are fewer. n int32, the same shape: at least 1, else
    the result is no position. Four bits at a time, by counting: a sort is no elementwise operation.
    """
    found = torch.zeros_like(n)
    for low in range(28, -1, -4):
        digit = torch.arange(1, 8 if low == 28 else 16, dtype=torch.int32, device=pos.device) * (1 << low)
        reached = used[:, :, None] & (pos[:, :, None] >= (found + digit)[..., None])
        found = found + (reached.int().sum(-1) >= n).int().sum(-1, keepdim=True).int() * (1 << low)
    return found


def _untouchable(spread: Tensor, pos: Tensor, used: Tensor, size: Tensor) -> Tensor:
    """The `size` used slots with the largest spread, ties older. A rank is the number of better slots: C * C
    comparisons, but no sort, which torch-mlir gives no linalg for.
    """
    spread = torch.where(used, spread, -INF)
    other, mine = spread[..., None, :], spread[..., :, None]
    older = pos[..., None, :] < pos[..., :, None]
    better = (other > mine) | ((other == mine) & older)
    rank = (better & used[..., None, :]).int().sum(-1)
    return used & (rank < size)
