"""A bias per slot: a number that is added to the slot's logit for every query of its KV head, after scale and cap, as
an additive mask is. One float of state, there only under rules whose records ask for it; a token comes with 0.
"""

from __future__ import annotations

import torch
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import is_ragged, padded
from kvpass.kernels.slots.state import Field, State, fields_of
from torch import Tensor

BIAS = "bias"

BIAS_FIELD = Field(BIAS, "BHC", torch.float32, 0.0)
"""For `Record.state_fields`."""


def biased(rule: Rule) -> bool:
    """Whether slots have a bias."""
    found: bool | None = rule.derived.get(biased)
    if found is None:
        found = rule.derived[biased] = any(field.name == BIAS for field in fields_of(rule))
    return found


def used_biases(state: State, slots: int) -> Tensor:
    """Of each head's first `slots` slots, float32 [B, Hkv, slots]; anything finite where none is in use. A view;
    ragged: a copy.
    """
    held = state[BIAS]
    return padded(held, state.cursor, slots, 0.0) if is_ragged(state.cursor) else held[..., :slots]
