"""Keys and values of slots as numbers again, whatever they are held as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.chosen import found_in
from kvpass.kernels.codecs.fits import NONE, Fit, Held, fit_of
from kvpass.kernels.codecs.hadamard import rotated
from kvpass.kernels.codecs.storage import HALVES, WHOLE_AT, Storage, coded, fit_fields
from kvpass.kernels.codecs.whole import found
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import is_ragged
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from torch import Tensor


def turned(x: Tensor, half: str, rule: Rule) -> Tensor:
    """float32 [.., width] as slots hold it: rotated, if the rule rotates that half. Twice is x again: so queries become
    those of coded keys, and mixed values those of the model.
    """
    return rotated(x) if rule[Storage].rotated and half in coded(rule) else x


def fit(held: Held, half: str, width: int, rule: Rule, own: slice | None = None, slots: Slots | None = None) -> Fit:
    """A half's fit, of what a state holds (`fit_of`): one that changes nothing where the rule has none."""
    return fit_of(held, half, rule[Storage].fit(half), width, own, slots)


def encoded(k: Tensor, v: Tensor, held: Held, rule: Rule) -> dict[str, Tensor]:
    """The code fields of keys [B, Hkv, n, D] and values [B, Hkv, n, Dv], by name. held: the state, for the fits of its
    heads.
    """
    storage = rule[Storage]
    alike = storage.k_as == storage.v_as and k.shape == v.shape and not fit_fields(rule)
    if alike and coded(rule):  # half as many calls: a step is made of them
        parts = _parts(torch.stack([k, v]), "k", held, rule)
        return {
            name: part[at]
            for at, half in enumerate(HALVES)
            for name, part in zip(storage.code_fields(half), parts, strict=True)
        }
    found = dict[str, Tensor]()
    for half in coded(rule):
        found |= dict(zip(storage.code_fields(half), _parts(k if half == "k" else v, half, held, rule), strict=True))
    return found


def _parts(x: Tensor, half: str, held: Held, rule: Rule) -> tuple[Tensor, ...]:
    storage, own = rule[Storage], fit(held, half, x.shape[-1], rule)
    return own.codec(storage.codec_of(half)).encode(turned(own.entered(x.float()), half, rule), storage.scale_group)


def decoded(parts: Sequence[Tensor], half: str, own: Fit, rule: Rule) -> Tensor:
    """float32 [.., coded] of a half's code fields [.., size], as slots hold it: fitted and `turned`."""
    storage = rule[Storage]
    codec = own.codec(storage.codec_of(half))
    return codec.decode(parts, storage.held_width(half, own.width), storage.scale_group)


def as_read(x: Tensor, half: str, rule: Rule) -> Tensor:
    """float32 [.., width] as `all_decoded` gives that half, and back: what has a fit is as the model has it, for whole
    copies have all channels; else it is rotated, if the rule says so.
    """
    return x if rule[Storage].fit(half) != NONE else turned(x, half, rule)


def all_decoded(state: State, half: str, rule: Rule, slots: Slots | None = None) -> Tensor:
    """float32 [B, Hkv, C, width] of a half's codes in all slots, `as_read`. slots: of a state that may be ragged."""
    own = fit(state, half, state[half].shape[3], rule, slots=slots)
    x = decoded([state[name] for name in rule[Storage].code_fields(half)], half, own, rule)
    return x if rule[Storage].fit(half) == NONE else own.left(turned(x, half, rule))


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
    x = as_read(all_decoded(state, half, rule), half, rule)
    if rule[Storage].copies:
        place, there = places(state, state[WHOLE_AT][:, :, None], rule)
        index = place[..., None].expand(*place.shape, x.shape[-1])
        x = torch.where(there[..., None], held.float().gather(-2, index), x)
    return x.to(held.dtype)
