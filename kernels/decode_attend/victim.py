"""The end of a step of decode_attend: count the token, and pick the slot that goes if over budget."""

from __future__ import annotations

import torch
from kvpass.kernels.decode_attend.step import Step
from kvpass.kernels.rank.ranking import INF, must_stay, preference, slot_scores, untouchable
from kvpass.kernels.rank.rings import enter
from kvpass.kernels.rule import FIRST, FREE, LIVE, NUMBER, RING, SEEN, UNTOUCHABLE, Rule
from kvpass.kernels.slots.ragged import padded, starts
from torch import Tensor


def settle(pos: Tensor, stats: Tensor, cursor: Tensor, step: Step, plan: Rule) -> None:
    """Advance the cursor; if over budget, evict one slot per head, leave the hole at FREE."""
    cursor[..., SEEN].add_(1)
    if step.starts:
        cursor[..., FIRST].masked_fill_(cursor[..., FIRST] < 0, step.position)
    if plan.rings:
        _enter(pos, stats, cursor, step, plan)
        return
    if step.evicts is False and plan.cut == -INF:
        cursor[..., : FREE + 1] = cursor[..., LIVE, None] + 1
        return
    used = used_positions(pos, cursor, step, plan)
    victim, lowest = _victim(used, _used_statistics(stats, cursor, step, plan), step, plan)
    flat, places = pos.view(-1), (starts(cursor, pos.shape[2])[..., None] + victim).view(-1)
    evicts = step.evicts if plan.cut == -INF else (lowest < plan.cut) | step.evicts
    if not isinstance(evicts, Tensor):
        cursor[..., FREE : FREE + 1] = victim
        flat.index_fill_(0, places, -1)
        return
    _leave(cursor, used, flat, places, victim, evicts)


def _leave(cursor: Tensor, used: Tensor, flat: Tensor, places: Tensor, victim: Tensor, evicts: Tensor) -> None:
    """Where `evicts` says so, the victim's slot becomes the hole; else the next slot is free."""
    live = cursor[..., LIVE, None] + ~evicts
    cursor[..., LIVE, None] = live
    cursor[..., FREE, None] = torch.where(evicts, victim, live).int()
    flat.index_copy_(0, places, torch.where(evicts, -1, used.gather(2, victim)).view(-1))


def _enter(pos: Tensor, stats: Tensor, cursor: Tensor, step: Step, plan: Rule) -> None:
    """The token finds its ring, and may drive another out of the last one."""
    used, told = pos[..., : step.slots], stats[..., : step.slots]
    score, rings = slot_scores(told, used, plan, step.number), told[plan.stat(RING)]
    room = (step.size - plan.sinks) // plan.rings
    slot, tokens = cursor[..., FREE, None].long(), cursor[..., SEEN, None]
    victim, evicts = enter(used, score, rings, slot, tokens, room, plan)
    places = (starts(cursor, pos.shape[2])[..., None] + victim).view(-1)
    _leave(cursor, used, pos.view(-1), places, victim, evicts)


def used_positions(pos: Tensor, cursor: Tensor, step: Step, plan: Rule) -> Tensor:
    """int32 [B, Hkv, n] of the used slots, -1 where a head uses fewer. A view; ragged: a copy."""
    return padded(pos, cursor, step.slots, -1) if plan.ragged else pos[..., : step.slots]


def _used_statistics(stats: Tensor, cursor: Tensor, step: Step, plan: Rule) -> Tensor:
    """float32 [N, B, Hkv, n], the same."""
    return padded(stats, cursor, step.slots, 0.0) if plan.ragged else stats[..., : step.slots]


def _victim(pos: Tensor, stats: Tensor, step: Step, plan: Rule) -> tuple[Tensor, Tensor]:
    """The slot each head gives up, int64 [B, Hkv, 1], and its score. Lowest unprotected score, ties evict the newer.

    torch's where and masked_fill are slow on CPU, so protection is arithmetic: `guard` is 0 for slots that may go, at
    least 3e38 for the others (empties, at position -1, among them).
    """
    score = slot_scores(stats, pos, plan, step.number)
    numbered = NUMBER in plan.stats
    where = torch.where(pos < 0, -1, stats[plan.stat(NUMBER)].int()) if numbered else pos
    low, high = _exposed(where, step, plan)
    outside = where - where.clamp(low, high)  # type: ignore[arg-type]  # both ints or both tensors
    guard = outside.float().abs_().mul_(UNTOUCHABLE)
    if plan.marked:
        guard.masked_fill_(must_stay(stats, plan), INF)
    scope = _scope(stats, pos, guard, step, plan) if plan.scope_num or plan.top_num else None
    eligible = score if scope is None else torch.add(score, scope, alpha=UNTOUCHABLE)
    lowest, victim = _guarded(eligible, guard, plan).topk(2, -1, largest=False)
    if all(a < b and a < UNTOUCHABLE for a, b in lowest.view(-1, 2).tolist()):
        return victim[..., :1], lowest[..., :1]
    if scope is not None:
        score = score.masked_fill(scope, UNTOUCHABLE)
    score = score.masked_fill(guard > 0, INF)
    least = score.amin(-1, keepdim=True)
    return torch.where(score == least, pos, -1).argmax(-1, keepdim=True), least


def _guarded(score: Tensor, guard: Tensor, plan: Rule) -> Tensor:
    """The score where the guard is 0, else the guard; negative scores need the slower road."""
    return torch.where(guard > 0, guard, score) if plan.scorer or plan.score == "last" else torch.maximum(score, guard)


def _exposed(where: Tensor, step: Step, plan: Rule) -> tuple[int | Tensor, int | Tensor]:
    """First and last that may be evicted, after the sinks and before the recent window; (.., -2) if none may. Numbers
    if the rule keeps them, else positions, as `where` [B, Hkv, n] are.
    """
    recent = plan.recent + step.size * plan.recent_num // plan.recent_den
    if plan.spread == "threshold":  # see `ranked`
        room = (step.size - plan.sinks) // 2
        recent = room.clamp(max=recent) if isinstance(room, Tensor) else min(recent, room)
    low: int | Tensor
    high: int | Tensor
    if NUMBER in plan.stats:
        low, high = plan.sinks, step.number - recent
    elif step.parted:
        low, high = _ends(where, plan.sinks, torch.as_tensor(recent, device=where.device))
    else:
        low, high = step.first + plan.sinks, step.position - recent
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        first, last = torch.as_tensor(low, device=where.device), torch.as_tensor(high, device=where.device)
        return first, torch.where(first > last, -2, last)
    return low, -2 if low > high else high


def _ends(pos: Tensor, sinks: int, recent: Tensor) -> tuple[Tensor, Tensor]:
    """The same where padding stands between tokens, so that positions do not count them: the slots of the first `sinks`
    and of the last `recent` tokens are all in use, and in order. pos [B, Hkv, n], -1 = empty.
    """
    rising = pos.sort(-1).values
    slots, empty = pos.shape[-1], (pos < 0).sum(-1, keepdim=True)
    low = rising.gather(-1, (empty + sinks - 1).clamp(min=0, max=slots - 1)) + 1 if sinks else torch.zeros_like(empty)
    first = torch.maximum(slots - recent, empty)  # of the window
    high = rising.gather(-1, first.expand_as(empty).clamp(max=slots - 1)) - 1
    return low, torch.where(first < slots, high, rising[..., -1:])


def _scope(stats: Tensor, pos: Tensor, guard: Tensor, step: Step, plan: Rule) -> Tensor:
    """Slots that the scope keeps out of reach: bool, the shape of pos."""
    spread = _guarded(preference(stats, pos, plan, step.number), guard, plan)
    if len(step.runs) > 1:
        spread = spread.masked_fill(pos < 0, -INF)
    if not plan.top_num:
        return untouchable(spread, pos, step.size * plan.scope_num // plan.scope_den + 1)
    reach = step.size * plan.top_num // plan.top_den
    return untouchable(spread, pos, reach) & (reach > 0)
