"""Whole copies in a step under a rule that demotes: its token gets one, and what the rule would evict loses its own.

The search for the victim is that of slots that go, among the places of copies: to the rule they are the slots.
"""

from __future__ import annotations

import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.codecs.chosen import clear, free_places, put
from kvpass.kernels.codecs.storage import WHOLE_AT
from kvpass.kernels.codecs.whole import keep_whole
from kvpass.kernels.decode_attend import device_victim, victim
from kvpass.kernels.decode_attend.call import Token
from kvpass.kernels.decode_attend.step import StepFacts
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, SEEN
from kvpass.kernels.slots.lookup import rising, slots_at
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from torch import Tensor


def hold_whole(token: Token, now: Tensor, valid: Tensor, state: State, rule: Rule) -> None:
    """Copy the step's token, if it is held whole beside its code, in place.

    now: int32 [1], its position; valid: bool [B, 1], whether there is one. That there is a free place is asserted: by
    the device, if there is one.
    """
    if not rule.demotes:
        keep_whole(token.k, token.v, now, valid, state.cursor[:, :1, SEEN], state, rule)
        return
    place, there = free_places(state)
    torch._assert_async(there.all(), "decode_attend: no place for the token's whole copy, all of a head are in use")
    put(token.k, token.v, now, valid[:, None], place, state, rule)


def demote(state: State, step: StepFacts, rule: Rule) -> None:
    """Where more tokens are held whole than the budget has room for, one of each head is demoted. Before the cursor
    advances.
    """
    at = state[WHOLE_AT]
    over = (at >= 0).sum(-1, keepdim=True) > step.size
    if not bool(over.any()):
        return
    slot = slots_at(at, rising(victim.used_positions(state, step)))
    place, _ = victim.victim_of(at, _statistics(state, slot), step, rule)
    clear(place, over, state, rule)


def demote_unread(state: State, now: Tensor, arrived: Tensor, rule: Rule) -> None:
    """The same without reading anything back. now: int32 [1, 1, 1]; arrived: bool [1 or B, 1, 1]."""
    at, cursor = state[WHOLE_AT], state.cursor
    number, first = cursor[..., SEEN, None], cursor[..., FIRST, None]
    first, size = torch.where(first < 0, now, first), budget(rule, number + 1)
    slot = torch.searchsorted(rising(state.pos), at).clamp(max=state.slots - 1)
    held = state.replaced(pos=at, stats=_statistics(state, slot))
    places, used = Slots(cursor, at.shape[2]), at >= 0
    gone, _ = device_victim.victim_of(held, places, used, (now, number, first, size), rule)
    over = (places.sum(used) > size) & arrived
    clear(places.amax(torch.where(gone, places.offset, 0)), over, state, rule)


def _statistics(state: State, slot: Tensor) -> Tensor:
    """float32 [N, B, Hkv, W], of the slots, int64 [B, Hkv, W]."""
    stats = state.stats
    return stats.gather(-1, slot.expand(len(stats), *slot.shape))
