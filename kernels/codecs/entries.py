"""Keys and values of slots as numbers again, whatever they are held as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.chosen import found_in
from kvpass.kernels.codecs.hadamard import rotated
from kvpass.kernels.codecs.storage import HALVES, WHOLE_AT, Storage, coded
from kvpass.kernels.codecs.whole import found
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.state import State
from torch import Tensor


def turned(x: Tensor, half: str, rule: Rule) -> Tensor:
    """float32 [.., width] as slots hold it: rotated, if the rule rotates that half. Twice is x again: so queries become
    those of coded keys, and mixed values those of the model.
    """
    return rotated(x) if rule[Storage].rotated and half in coded(rule) else x


def encoded(k: Tensor, v: Tensor, rule: Rule) -> dict[str, Tensor]:
    """The code fields of keys [.., D] and values [.., Dv], by name."""
    storage = rule[Storage]
    if (
        storage.k_as == storage.v_as and k.shape == v.shape and coded(rule)
    ):  # half as many calls: a step is made of them
        parts = _parts(torch.stack([k, v]), "k", rule)
        return {
            name: part[at]
            for at, half in enumerate(HALVES)
            for name, part in zip(storage.code_fields(half), parts, strict=True)
        }
    found = dict[str, Tensor]()
    for half in coded(rule):
        found |= dict(zip(storage.code_fields(half), _parts(k if half == "k" else v, half, rule), strict=True))
    return found


def _parts(x: Tensor, half: str, rule: Rule) -> tuple[Tensor, ...]:
    storage = rule[Storage]
    return storage.codec_of(half).encode(turned(x.float(), half, rule), storage.scale_group)


def decoded(parts: Sequence[Tensor], half: str, width: int, rule: Rule) -> Tensor:
    """float32 [.., width] of a half's code fields [.., size], as slots hold it (`turned`)."""
    storage = rule[Storage]
    return storage.codec_of(half).decode(parts, width, storage.scale_group)


def places(state: State, at: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The place of each slot's whole copy, int64 [B, Hkv, C], and whether it has one. at: what the places hold, of each
    slot's head, int32 [B, Hkv, 1 or C, W].
    """
    return found_in(state) if rule[Storage].by_score else found(at, state.pos)


def entries_of(state: State, half: str, rule: Rule) -> Tensor:
    """Keys (`k`) or values (`v`) [B, Hkv, C, width] of a state that is not ragged, in the model's dtype: a copy where
    they are coded. What empty slots hold is undefined.
    """
    held = state[half]
    if half not in coded(rule):
        return held
    if is_ragged(state.cursor):
        raise ValueError("entries_of: heads of a ragged state lie one behind the other; even it out first")
    parts = [state[name] for name in rule[Storage].code_fields(half)]
    x = turned(decoded(parts, half, held.shape[3], rule), half, rule)
    if rule[Storage].copies:
        place, there = places(state, state[WHOLE_AT][:, :, None], rule)
        index = place[..., None].expand(*place.shape, x.shape[-1])
        x = torch.where(there[..., None], held.float().gather(-2, index), x)
    return x.to(held.dtype)
