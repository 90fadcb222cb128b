"""A state with some of another's slots, after a call."""

from __future__ import annotations

from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.exits.merge_slots import merge
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.moves import unused
from kvpass.kernels.slots.state import State
from torch import Tensor


def compacted(
    state: State, score: Tensor, chosen: Tensor, cursor: Tensor, slots: int, rule: Rule, merges: bool
) -> State:
    """A state of `slots` slots per head with the chosen ones of another, whose heads are equally long, in the order of
    positions. score: float32 [B, Hkv, C], -inf where a slot is empty; merges: whether what goes comes into what stays.
    """
    out = unused(state, slots, cursor.clone())
    compact_slots([tensor for _, tensor in state.per_slot()], chosen, cursor, out.tensors(), rule.encode())
    if merges:
        merge(state.k, state.v, (score, state.stats, chosen), out, rule)
    return out
