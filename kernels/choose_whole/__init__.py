"""choose_whole: which keys of a call of several tokens are held whole, where all others are demoted to codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.codecs.chosen import keep_chosen
from kvpass.kernels.codecs.storage import WHOLE_AT
from kvpass.kernels.rank.criterion import DEMOTED
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import LIVE, SEEN
from kvpass.kernels.slots.state import State
from torch import Tensor


def choose_whole(k: Tensor, v: Tensor, pos: Tensor | None, score: Tensor, state: Sequence[Tensor], rule: str) -> None:
    """Copy the best keys that the budget has room for into the state, in place, after the call's `compact_slots`.

    k [B, Hkv, L, D], v [B, Hkv, L, Dv], pos int32 [B, Hkv, L] or None: all keys, as `compact_slots` got them; score
    float32 [B, Hkv, L] of `score_slots`: what is not above `DEMOTED` was demoted before, or is nobody's. state: the
    tensors of `State` under the rule, with more places than the budget has room for.
    """
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    cursor = held.cursor.clone()
    whole = torch.minimum(budget(plan, cursor[..., SEEN]), (score > DEMOTED).sum(-1))
    cursor[..., LIVE] = whole.int()
    keep_chosen(k, v, pos, select_slots(score, cursor, held[WHOLE_AT].shape[2]), held, plan)
