"""The end of a step without reading anything back: `kvpass.kernels.decode_attend.victim` with fixed shapes."""

from __future__ import annotations

import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.exits.merge_victim import merge_victim
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.criterion import INF, UNTOUCHABLE
from kvpass.kernels.rank.marks import Marks, must_stay
from kvpass.kernels.rank.places import NUMBER, Protected
from kvpass.kernels.rank.ranking import ordered, preference, reach_of, recent_of, slot_scores
from kvpass.kernels.rank.rings import RING, Rings, enter
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import keeps, stat
from torch import Tensor


def evict(state: State, slots: Slots, used: Tensor, now: Tensor, arrived: Tensor, plan: Rule) -> None:
    """Advance the cursor of the rows whose token has arrived; if over budget, evict one slot per head.

    used: bool [B, Hkv, C], with the token; now int32 [1, 1, 1]; arrived bool [1 or B, 1, 1].
    """
    cursor, pos = state.cursor, state.pos
    held, seen, first = (cursor[..., at, None] for at in (LIVE, SEEN, FIRST))
    held, number, first = held + 1, seen.clone(), torch.where(first < 0, now, first)
    free, goes = held, torch.zeros_like(held, dtype=torch.bool)
    rings = plan[Rings].rings > 0
    if plan.drops or rings:
        size = budget(plan, number + 1)
        size = size + cursor[..., EXTRA, None] if slots.ragged else size
        if rings:
            gone, goes = _driven_out(state, number, size, arrived, plan)
        else:
            gone, least = victim_of(state, slots, used, (now, number, first, size), plan)
            goes = (held > size) | (least < plan[ShareOut].cut)
        gone = gone & slots.of(goes & arrived)
        if plan[Merge].steps:
            merge_victim(state, slots, used, gone, plan)
        hole = slots.amax(torch.where(gone, slots.offset, 0))
        pos.masked_fill_(gone, -1)
        free = torch.where(goes, hole, held)
    after = {LIVE: held - goes.int(), FREE: free, SEEN: number + 1, FIRST: first}
    for column, value in after.items():
        target = cursor[..., column, None]
        target.copy_(torch.where(arrived, value, target))


def _driven_out(state: State, number: Tensor, size: Tensor, arrived: Tensor, plan: Rule) -> tuple[Tensor, Tensor]:
    """The token finds its ring: which slot it drives out, bool [B, Hkv, C], and whether it drives out any."""
    rings, cursor = state.stats[stat(plan, RING)], state.cursor
    moved, score = rings.clone(), slot_scores(state.stats, state.pos, plan, number)
    room = (size - plan[Protected].sinks) // plan[Rings].rings
    slot, tokens = cursor[..., FREE, None].long(), number + 1
    victim, evicts = enter(state.pos, score, moved, slot, tokens, room, plan)
    rings.copy_(torch.where(arrived, moved, rings))
    return torch.arange(rings.shape[-1], device=rings.device) == victim, evicts


def victim_of(
    state: State, slots: Slots, used: Tensor, step: tuple[Tensor, Tensor, Tensor, Tensor], plan: Rule
) -> tuple[Tensor, Tensor]:
    """The slot that each head would give up, bool [B, Hkv, C], and its score [B, Hkv, 1]. Lowest unprotected score,
    ties evict the newer. step: position, the token's number, the first position and the budget of the heads.
    """
    (now, number, first, size), stats, pos = step, state.stats, state.pos
    latest = slots.of(number)
    score = slot_scores(stats, pos, plan, latest)
    where = stats[stat(plan, NUMBER)].int() if keeps(plan, NUMBER) else pos
    low, high = _exposed(slots, used, pos, (now, number, first, size), plan)
    protected = (where < slots.of(low)) | (where > slots.of(high))
    if plan[Marks].marked:
        protected = protected | must_stay(stats, plan)
    reach = reach_of(plan, size)
    if reach is not None:
        deviation = torch.where(protected, INF, preference(stats, pos, plan, latest))
        key = ordered(torch.where(used, deviation, -INF), pos)
        last = slots.ranked(key, reach - 1, descending=True)
        score = torch.where((key >= slots.of(last)) & slots.of(reach > 0), UNTOUCHABLE, score)
    score = torch.where(protected | ~used, INF, score)
    least = slots.amin(score)
    newest = slots.amax(torch.where(used & (score == slots.of(least)), pos, -1))
    return used & (pos == slots.of(newest)), least


def _exposed(
    slots: Slots, used: Tensor, pos: Tensor, step: tuple[Tensor, Tensor, Tensor, Tensor], plan: Rule
) -> tuple[Tensor, Tensor]:
    """First and last that may be evicted, after the sinks and before the recent window: [B, Hkv, 1], numbers if the
    rule keeps them, else positions.
    """
    (now, number, first, size), sinks = step, plan[Protected].sinks
    recent = recent_of(plan, size) + torch.zeros_like(number)
    if keeps(plan, NUMBER):
        return torch.full_like(recent, sinks), number - recent
    held, empty = torch.where(used, pos, -1), slots.width - slots.sum(used)
    parted = now - first != number
    low = slots.ranked(held, empty + sinks - 1) + 1 if sinks else torch.zeros_like(recent)
    start = torch.maximum(slots.width - recent, empty)
    high = torch.where(start < slots.width, slots.ranked(held, start) - 1, slots.amax(held))
    return torch.where(parted, low, first + sinks), torch.where(parted, high, now - recent)
