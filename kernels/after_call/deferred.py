"""Evictions that waited: what goes after a step, outside its graph (`Timing.every`). Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.after_call.compacted import compacted
from kvpass.kernels.budget import budget
from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.criterion import SCORED
from kvpass.kernels.rank.marks import MARK, Marks
from kvpass.kernels.rank.places import slot_places
from kvpass.kernels.rank.ranking import shared_by_heads, state_scores
from kvpass.kernels.rank.scored import Beside, Scoring, scorer_scores
from kvpass.kernels.rank.scorers.registry import find_scorer
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import EXTRA, FREE, LIVE, SEEN
from kvpass.kernels.slots.moves import even, with_chosen
from kvpass.kernels.slots.ragged import Ragged, columns
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import stat
from torch import Tensor


def evicted(state: State, rule: Rule) -> State:
    """The state with the best slots of each head that the budget has room for, in as many slots. A copy. Steps have
    appended to it, so that its slots are in the order of positions. A scorer that needs no more than keys and values
    judges all of them again (LagKV and KeyDiff while they generate).
    """
    slots, ragged, judged = state.slots, rule[Ragged].ragged, _judges_again(rule)
    light = ragged and not judged and not rule[Merge].steps  # heads side by side are a copy: not of keys and values
    held = even(_without_entries(state) if light else state)
    cursor = torch.nn.functional.pad(held.cursor, (0, columns(rule) - EXTRA)) if ragged else held.cursor.clone()
    held = held.replaced(cursor=cursor)
    if judged:
        held = held.replaced(stats=_judged(held, rule))
    score, candidate = state_scores(held, rule), held.pos >= 0
    cursor = cursor.clone()
    live = torch.minimum(budget(rule, cursor[..., SEEN]), candidate.sum(-1)).int()
    cursor[..., LIVE] = cursor[..., FREE] = live
    cursor = shared_by_heads(score, candidate, cursor, rule) if ragged else cursor
    chosen = select_slots(score, cursor, score.shape[-1] if ragged else slots)
    if light:
        return with_chosen(state, chosen, cursor)
    return compacted(held, score, chosen, cursor, slots, rule, rule[Merge].steps)


def _without_entries(state: State) -> State:
    """What ranks slots, without what they hold."""
    held = {field.name for field, _ in state.per_slot() if field.entries and field.dims[-1] != "C"}
    return state.mapped(lambda field, tensor: tensor[..., :0] if field.name in held else tensor)


def _judged(state: State, rule: Rule) -> Tensor:
    """The statistics with scores given anew: [N, B, Hkv, C]."""
    stats = state.stats.clone()
    had = stats[stat(rule, SCORED)], stats[stat(rule, MARK)] if rule[Marks].marked else None
    read, own = Beside(entries_of(state, "k", rule), entries_of(state, "v", rule)), (state.slots, None)
    scores = scorer_scores(stats[:0], _places(state, rule), state.cursor, read, had, own, rule)
    stats[stat(rule, SCORED)] = scores[0]
    return stats


def _places(state: State, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the slots, which are in use, and one past the last place."""
    where = slot_places(state.pos, state.cursor, state.stats, rule)
    return where, state.pos >= 0, where.amax(-1, keepdim=True) + 1


def _judges_again(rule: Rule) -> bool:
    """Whether slots hold a score that can be given anew from what they hold, and that changes with the others."""
    if not rule[Scoring].scorer:
        return False
    scorer = find_scorer(rule[Scoring].scorer)
    return not scorer.pointwise and set(scorer.reads) <= {"keys", "values", "layer"}
