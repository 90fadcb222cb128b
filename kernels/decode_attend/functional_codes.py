"""Coded slots in the pure step (`functional`): nothing is written in place, places are found by comparison."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.entries import all_decoded, as_read, encoded
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.codecs.whole import late_place
from kvpass.kernels.decode_attend.call import Token
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.state import State
from torch import Tensor


def brought(token: Token, state: State, plan: Rule) -> dict[str, Tensor]:
    """What a token brings into its slots, [B, Hkv, 1, size] each, by the name of the field."""
    own = {half: x for half, x in (("k", token.k), ("v", token.v)) if half not in coded(plan)}
    return own | encoded(token.k, token.v, state, plan)


def copied(token: Token, state: State, now: Tensor, arrived: Tensor, plan: Rule) -> dict[str, Tensor]:
    """The fields of whole copies with the token's own, as `kvpass.kernels.codecs.whole.keep_whole` has it. now: int32
    []; arrived: bool, broadcastable to [B, 1, 1].
    """
    storage = plan[Storage]
    if not coded(plan) or not storage.whole:
        return {}
    number = state.cursor[..., SEEN : SEEN + 1]
    place = torch.where(number < storage.whole_sinks, number, late_place(number, storage))
    here = (torch.arange(storage.whole, dtype=torch.int32, device=now.device) == place) & arrived
    found = {WHOLE_AT: torch.where(here, now, state[WHOLE_AT])}
    for half in coded(plan):
        found[half] = torch.where(here[..., None], token.k if half == "k" else token.v, state[half])
    return found


def read(state: State, half: str, plan: Rule) -> Tensor:
    """Keys (`k`) or values (`v`) in all slots, float32 [B, Hkv, C, width], `as_read`; undefined where nothing is."""
    held = state[half].float()
    if half not in coded(plan):
        return held
    x = all_decoded(state, half, plan)
    if not plan[Storage].whole:
        return x
    same = (state.pos[..., None] == state[WHOLE_AT][:, :, None]) & (state.pos >= 0)[..., None]
    return torch.where(same.any(-1, keepdim=True), same.float() @ as_read(held, half, plan), x)
