"""Evictions that waited: what goes after a step, outside its graph (`Rule.every`). Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.rank.allocate import budgets
from kvpass.kernels.rank.held import Read, held_scores
from kvpass.kernels.rank.places import slot_places
from kvpass.kernels.rank.ranking import shared_by_heads, state_scores
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rule import EXTRA, FREE, HELD, LIVE, MARK, SEEN, Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.ragged import empty_like, even
from torch import Tensor


def thinned(state: list[Tensor], rule: Rule) -> list[Tensor]:
    """The state (k, v, pos, stats, cursor) with the best slots of each head that the budget has room for, in as many
    slots. A copy. Steps have appended to it, so that its slots are in the order of positions. A scorer that needs no
    more than keys and values judges all of them again (LagKV and KeyDiff while they generate).
    """
    slots, (k, v, pos, stats, cursor) = state[0].shape[2], even(state)
    candidate = pos >= 0
    if rule.ragged:
        cursor = torch.nn.functional.pad(cursor, (0, rule.columns - EXTRA))
    if _judges_again(rule):
        stats = stats.clone()
        beside = stats[rule.stat(HELD)], stats[rule.stat(MARK)] if rule.marked else None
        where = slot_places(pos, cursor, stats, rule)
        keys = where, candidate, where.amax(-1, keepdim=True) + 1
        own = pos.shape[-1], None
        stats[rule.stat(HELD)], _ = held_scores(stats[:0], keys, cursor, Read(k, v), beside, own, rule)
    score = state_scores([k, v, pos, stats, cursor], rule)
    cursor = cursor.clone()
    live = torch.minimum(budgets(cursor[..., SEEN], rule), candidate.sum(-1)).int()
    cursor[..., LIVE] = cursor[..., FREE] = live
    cursor = shared_by_heads(score, candidate, cursor, rule) if rule.ragged else cursor
    out = [*empty_like(state, slots), cursor.clone()]
    chosen = select_slots(score, cursor, score.shape[-1] if rule.ragged else slots)
    compact_slots(k, v, pos, stats, chosen, cursor, *out)
    return out


def _judges_again(rule: Rule) -> bool:
    """Whether slots hold a score that can be given anew from what they hold, and that changes with the others."""
    if not rule.scorer:
        return False
    scorer = find_scorer(rule.scorer)
    return not scorer.pointwise and set(scorer.reads) <= {"keys", "values", "layer"}
