"""The end of a step of decode_attend: count the token, and pick the slot that goes if over budget."""

from __future__ import annotations

import torch
from kvpass.kernels.decode_attend.step import StepFacts
from kvpass.kernels.exits.merge_victim import merge_victim
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.criterion import INF, SCORED, UNTOUCHABLE, Ranking
from kvpass.kernels.rank.marks import Marks, must_stay
from kvpass.kernels.rank.places import NUMBER, Protected
from kvpass.kernels.rank.ranking import preference, reach_of, recent_of, slot_scores, untouchable
from kvpass.kernels.rank.rings import RING, Rings, enter
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.ragged import is_ragged, padded, starts
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor


def evict_one(state: State, step: StepFacts, plan: Rule) -> None:
    """Advance the cursor; if over budget, evict one slot per head, leave the hole at FREE."""
    cursor = state.cursor
    cursor[..., SEEN].add_(1)
    if step.starts:
        cursor[..., FIRST].masked_fill_(cursor[..., FIRST] < 0, step.position)
    if plan[Rings].rings:
        _enter(state, step, plan)
        return
    if step.evicts is False and plan[ShareOut].cut == -INF:
        cursor[..., : FREE + 1] = cursor[..., LIVE, None] + 1
        return
    used = used_positions(state, step)
    victim, lowest = victim_of(used, _used_statistics(state, step), step, plan)
    flat, places = state.pos.view(-1), (starts(cursor, state.slots)[..., None] + victim).view(-1)
    evicts = step.evicts if plan[ShareOut].cut == -INF else (lowest < plan[ShareOut].cut) | step.evicts
    if plan[Merge].steps:
        _merge(state, victim, evicts, plan)
    if not isinstance(evicts, Tensor):
        cursor[..., FREE : FREE + 1] = victim
        flat.index_fill_(0, places, -1)
        return
    _leave(cursor, used, flat, places, victim, evicts)


def _merge(state: State, victim: Tensor, evicts: bool | Tensor, plan: Rule) -> None:
    """What goes comes into slots that stay. victim: int64 [B, Hkv, 1]; LIVE is that of before the token."""
    slots = Slots(state.cursor, state.slots)
    used = slots.offset <= slots.of(state.cursor[..., LIVE, None])
    goes = torch.as_tensor(evicts, device=used.device).expand(victim.shape)
    merge_victim(state, slots, used, (slots.offset == slots.of(victim)) & slots.of(goes), plan)


def _leave(cursor: Tensor, used: Tensor, flat: Tensor, places: Tensor, victim: Tensor, evicts: Tensor) -> None:
    """Where `evicts` says so, the victim's slot becomes the hole; else the next slot is free."""
    live = cursor[..., LIVE, None] + ~evicts
    cursor[..., LIVE, None] = live
    cursor[..., FREE, None] = torch.where(evicts, victim, live).int()
    flat.index_copy_(0, places, torch.where(evicts, -1, used.gather(2, victim)).view(-1))


def _enter(state: State, step: StepFacts, plan: Rule) -> None:
    """The token finds its ring, and may drive another out of the last one."""
    cursor, used, told = state.cursor, state.pos[..., : step.slots], state.stats[..., : step.slots]
    score, rings = slot_scores(told, used, plan, step.number), told[stat(plan, RING)]
    room = (step.size - plan[Protected].sinks) // plan[Rings].rings
    slot, tokens = cursor[..., FREE, None].long(), cursor[..., SEEN, None]
    victim, evicts = enter(used, score, rings, slot, tokens, room, plan)
    places = (starts(cursor, state.slots)[..., None] + victim).view(-1)
    _leave(cursor, used, state.pos.view(-1), places, victim, evicts)


def used_positions(state: State, step: StepFacts) -> Tensor:
    """int32 [B, Hkv, n] of the used slots, -1 where a head uses fewer. A view; ragged: a copy."""
    ragged = is_ragged(state.cursor)
    return padded(state.pos, state.cursor, step.slots, -1) if ragged else state.pos[..., : step.slots]


def _used_statistics(state: State, step: StepFacts) -> Tensor:
    """float32 [N, B, Hkv, n], the same."""
    ragged = is_ragged(state.cursor)
    return padded(state.stats, state.cursor, step.slots, 0.0) if ragged else state.stats[..., : step.slots]


def victim_of(pos: Tensor, stats: Tensor, step: StepFacts, plan: Rule) -> tuple[Tensor, Tensor]:
    """The slot each head gives up, int64 [B, Hkv, 1], and its score. Lowest unprotected score, ties evict the newer.
    pos: int32 [B, Hkv, n], -1 where a slot is empty; stats: float32 [N, B, Hkv, n].

    torch's where and masked_fill are slow on CPU, so protection is arithmetic: `guard` is 0 for slots that may go, at
    least 3e38 for the others (empties, at position -1, among them).
    """
    score = slot_scores(stats, pos, plan, step.number)
    where = torch.where(pos < 0, -1, stats[stat(plan, NUMBER)].int()) if keeps(plan, NUMBER) else pos
    low, high = _exposed(where, step, plan)
    outside = where - where.clamp(low, high)  # type: ignore[arg-type]  # both ints or both tensors
    guard = outside.float().abs_().mul_(UNTOUCHABLE)
    if plan[Marks].marked:
        guard.masked_fill_(must_stay(stats, plan), INF)
    reach = reach_of(plan, step.size)
    scope = None if reach is None else _scope(stats, pos, guard, reach, step, plan)
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
    negative = plan[Ranking].score in (SCORED, "last")
    return torch.where(guard > 0, guard, score) if negative else torch.maximum(score, guard)


def _exposed(where: Tensor, step: StepFacts, plan: Rule) -> tuple[int | Tensor, int | Tensor]:
    """First and last that may be evicted, after the sinks and before the recent window; (.., -2) if none may. Numbers
    if the rule keeps them, else positions, as `where` [B, Hkv, n] are.
    """
    recent, sinks = recent_of(plan, step.size), plan[Protected].sinks
    low: int | Tensor
    high: int | Tensor
    if keeps(plan, NUMBER):
        low, high = sinks, step.number - recent
    elif step.parted:
        low, high = _ends(where, sinks, torch.as_tensor(recent, device=where.device))
    else:
        low, high = step.first + sinks, step.position - recent
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


def _scope(stats: Tensor, pos: Tensor, guard: Tensor, reach: int | Tensor, step: StepFacts, plan: Rule) -> Tensor:
    """Slots that the scope keeps out of reach: bool, the shape of pos."""
    deviation = _guarded(preference(stats, pos, plan, step.number), guard, plan)
    if len(step.ranges) > 1 or plan.demotes:
        deviation = deviation.masked_fill(pos < 0, -INF)
    beyond = untouchable(deviation, pos, reach)
    return beyond & (reach > 0)
