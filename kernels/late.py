"""Evictions that waited: what goes after a step, outside its graph (`Rule.every`). Pure torch."""

from __future__ import annotations

import torch
from kvpass.kernels.allocate import budgets
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.ragged import empty_like, even
from kvpass.kernels.rule import EXTRA, FREE, LIVE, SEEN, Rule
from kvpass.kernels.scores import ranked, shared_by_heads
from kvpass.kernels.select_slots import select_slots
from torch import Tensor


def thinned(state: list[Tensor], rule: Rule) -> list[Tensor]:
    """The state (k, v, pos, stats, cursor) with the best slots of each head that the budget has room for, in as many
    slots. A copy. Steps have appended to it, so that its slots are in the order of positions.
    """
    slots, (k, v, pos, stats, cursor) = state[0].shape[2], even(state)
    candidate = pos >= 0
    if rule.ragged:
        cursor = torch.nn.functional.pad(cursor, (0, rule.columns - EXTRA))
    score = ranked(stats, pos, candidate, pos.amax(-1, keepdim=True) + 1, cursor, rule)
    cursor = cursor.clone()
    live = torch.minimum(budgets(cursor[..., SEEN], rule), candidate.sum(-1)).int()
    cursor[..., LIVE] = cursor[..., FREE] = live
    cursor = shared_by_heads(score, candidate, cursor, rule) if rule.ragged else cursor
    out = [*empty_like(state, slots), cursor.clone()]
    chosen = select_slots(score, cursor, score.shape[-1] if rule.ragged else slots)
    compact_slots(k, v, pos, stats, chosen, cursor, *out)
    return out
