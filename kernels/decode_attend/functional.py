"""decode_attend as a pure function of tensors: what a tracer takes apart and a compiler lowers.

No Python branch looks at a tensor, nothing is written in place, and there is no sort, scatter or argmin: slots are
picked by comparison, so that the whole step is elementwise operations, reductions and two matrix products. It reads
and copies all slots, so it is the form for other compilers, not the fast path of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kvpass.kernels.attention.masks import by_kv_head, visible
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.budget import Budget, budget
from kvpass.kernels.codecs.entries import as_read
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.functional_codes import brought, copied, read
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.rank.criterion import INF, UNTOUCHABLE, Ranking, Scope
from kvpass.kernels.rank.layer import Layer
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.ranking import deviations, reach_of, recent_of, slot_scores
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rank.smooth import Pool
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from torch import Tensor


def supports(rule: Rule) -> bool:
    """Whether a rule can be said in this form: attention's sums, squares and counts, heads and layers alike, an
    eviction in each step that drops its slot, and keys and values as they are or coded. What calls of several tokens
    fit (`Refit`) a step only reads.
    """
    known = rule.only(Statistics, Observation, Pool, Ranking, Protected, Scope, Budget, Layer, Scoring, Storage, Refit)
    steady = rule.of_steps is rule and not rule.demotes
    return known and set(rule[Statistics].stats) <= {"sum", "sumsq", "count"} and steady


def decode_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    mask: Tensor | None,
    state: Sequence[Tensor],
    position: int,
    scale: float,
    rule: str,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
) -> list[Tensor]:
    """`kvpass.kernels.decode_attend.decode_attend` without mutation.

    Arguments as there. sinks: float [Hq], one more logit per query head in the softmax's denominator. softcap: above
    0, logits become `softcap * tanh(logits / softcap)` before the mask.

    Returns out [B, Hq, 1, Dv] in q's dtype, then the state after the token, none of it an argument. Raises ValueError
    for a rule that does not fit the number of statistics.
    """
    plan = Rule.parse(rule)
    before, names = State.of(state, plan), plan[Statistics].stats
    if len(before.stats) != len(names):
        raise ValueError(f"decode_step: the rule keeps {len(names)} statistics, got {len(before.stats)}")
    softmax = softmax_of("decode_step", q, scale, sinks, softcap, memory_k, memory_v)
    call = Call(mask, position, softmax, plan)
    arrived = _arrived(mask, position, q)
    held = _appended(before, Token(q, k_new, v_new), position, arrived, plan)
    shown, bias = _shown(mask, held.pos)
    if biased(plan):
        own = held[BIAS][:, :, None]
        bias = own if bias is None else bias + own
    probs = _probabilities(as_read(q.float(), "k", plan), read(held, "k", plan), shown, bias, call.softmax)
    values = torch.where(
        (held.pos >= 0)[..., None], read(held, "v", plan), 0.0
    )  # 0 times an undefined value may be NaN
    out = as_read(probs @ values, "v", plan)
    out = out if softmax.beside is None else softmax.beside.added(out, probs.sum(-1, keepdim=True))
    out = out.to(q.dtype).reshape(*q.shape[:3], v_new.shape[3])
    held = held.replaced(stats=_observed(held.stats, probs, shown.any(2) & arrived, arrived, plan))
    return [out, *_evicted(held, _now(position, q), arrived, plan).tensors()]


def _now(position: int, q: Tensor) -> Tensor:
    return torch.scalar_tensor(position, dtype=torch.int32, device=q.device)


def _free_slot(state: State) -> Tensor:
    """bool [B, Hkv, C]"""
    slot = torch.arange(state.slots, dtype=torch.int32, device=state.cursor.device)
    return slot == _column(state.cursor, FREE)


def _appended(state: State, token: Token, position: int, arrived: Tensor, plan: Rule) -> State:
    """The state with the token in its slots, and 0 for its statistics and its bias."""
    here, now = _free_slot(state) & arrived, _now(position, token.q)
    new = {name: torch.where(here[..., None], x, state[name]) for name, x in brought(token, state, plan).items()}
    own = {"pos": torch.where(here, now, state.pos), "stats": torch.where(here, 0.0, state.stats)}
    own |= {BIAS: torch.where(here, 0.0, state[BIAS])} if biased(plan) else {}
    return state.replaced(**new, **own, **copied(token, state, now, arrived, plan))


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


def _probabilities(q: Tensor, k: Tensor, shown: Tensor, bias: Tensor | None, softmax: Softmax) -> Tensor:
    """float32 [B, Hkv, G, C], 0 where a slot is hidden or empty, all 0 in rows that see nothing. q and k: float32."""
    (batch, heads), softcap = k.shape[:2], softmax.softcap
    queries = (q * softmax.scale).reshape(batch, heads, q.shape[1] // heads, q.shape[3])
    logits = queries @ k.transpose(-1, -2)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    logits = torch.where(shown, logits, -INF)
    top = logits.amax(-1, keepdim=True)
    sink = softmax.column(heads)
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
    if not plan[Statistics].stats or plan[Observation].decode == "none":
        return stats
    row = probs.mean(2) if plan[Observation].group == "mean" else probs.amax(2)
    added = torch.stack(
        [{"sum": row, "sumsq": row * row, "count": seen.float()}[name] for name in plan[Statistics].stats]
    )
    after = added if plan[Observation].decode == "replace" else stats + added
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


def _evicted(state: State, now: Tensor, arrived: Tensor, plan: Rule) -> State:
    """The state after evicting one slot in each head that is over its budget."""
    pos = state.pos
    live, free, seen, first = (_column(state.cursor, at) for at in (LIVE, FREE, SEEN, FIRST))
    seen = seen + arrived.int()
    first = torch.where(arrived & (first < 0), now, first)
    size = budget(plan, seen).int()
    grows = arrived if not plan.evicts else arrived & (live + 1 <= size)
    grown = live + grows.int()
    if plan.evicts:
        gone = _victim(state.stats, _Choice(pos, pos >= 0, size, first, now, seen), plan) & (arrived & ~grows)
        slot = torch.arange(pos.shape[2], dtype=torch.int32, device=pos.device)
        hole = torch.where(gone, slot, 0).amax(-1, keepdim=True)
        free = torch.where(arrived & ~grows, hole, free)
        pos = torch.where(gone, -1, pos)
    free = torch.where(grows, grown, free)
    columns = {LIVE: grown, FREE: free, SEEN: seen, FIRST: first}
    return state.replaced(pos=pos, cursor=torch.cat([columns[at].int() for at in range(4)], -1))


def _victim(stats: Tensor, choice: _Choice, plan: Rule) -> Tensor:
    """The slot that each head would give up: bool [B, Hkv, C], one True. Lowest score, ties evict the newer."""
    pos, used, size = choice.pos, choice.used, choice.size
    score = slot_scores(stats, pos, plan)
    protected = _protected(choice, plan)
    if plan[Scope].scope_num:
        deviation = torch.where(protected, INF, deviations(stats, plan))
        score = torch.where(_untouchable(deviation, pos, used, reach_of(plan, size).int()), UNTOUCHABLE, score)
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
    if plan[Protected].recent or plan[Protected].recent_num:
        recent = recent_of(plan, size).int()
        young = torch.where(parted, _nth_largest(pos, used, recent), now - recent + 1)
        protected = protected | (pos >= young)
    sinks = plan[Protected].sinks
    if sinks:
        count = used.int().sum(-1, keepdim=True) - sinks
        old = torch.where(parted, _nth_largest(pos, used, count + 1), first + sinks - 1)
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


def _untouchable(deviation: Tensor, pos: Tensor, used: Tensor, size: Tensor) -> Tensor:
    """The `size` used slots with the largest deviation, ties older. A rank is the number of better slots: C * C
    comparisons, but no sort, which torch-mlir gives no linalg for.
    """
    deviation = torch.where(used, deviation, -INF)
    other, mine = deviation[..., None, :], deviation[..., :, None]
    older = pos[..., None, :] < pos[..., :, None]
    better = (other > mine) | ((other == mine) & older)
    rank = (better & used[..., None, :]).int().sum(-1)
    return used & (rank < size)
