"""The ops of rules whose slots hold codes: the codes of a call's keys, and whole copies of its newest tokens. Pure
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs import whole
from kvpass.kernels.codecs.entries import encoded
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.state import State
from torch import Tensor


def encode_slots(k: Tensor, v: Tensor, rule: str) -> list[Tensor]:
    """Code fields of keys [B, Hkv, L, D] and values [B, Hkv, L, Dv], in the order of the state's fields: each
    [B, Hkv, L, size].
    """
    return [*encoded(k, v, Rule.parse(rule)).values()]


def keep_whole(k: Tensor, v: Tensor, valid: Tensor, position: int, state: Sequence[Tensor], rule: str) -> None:
    """Copy those of a call's tokens that are held whole beside their codes into the state, in place, after the call's
    `compact_slots`. k [B, Hkv, S, D], v [B, Hkv, S, Dv], at positions `position` .. ; valid bool [B, S], without
    padding.
    """
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    pos = torch.arange(position, position + k.shape[2], dtype=torch.int32, device=k.device)
    seen = held.cursor[:, :1, SEEN] - valid.sum(-1, keepdim=True)
    whole.keep_whole(k, v, pos, valid, seen, held, plan)
