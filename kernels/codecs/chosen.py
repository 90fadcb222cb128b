"""Whole copies of the tokens that a rule's budget has room for, beside the codes of all (`Storage.by_score`).

Copies are to the rule what slots are elsewhere: each head has as many as the budget says, chosen by the same scores,
and what it would evict loses its copy. The code is there already, made of the model's own numbers: demotion is sticky,
and nothing is rounded twice. No slot leaves, so slots are in order of position; `whole_at` says which position a place
holds. Places without a token hold zeros.
"""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.storage import WHOLE_AT, coded
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.lookup import places_of, rising
from kvpass.kernels.slots.state import State
from torch import Tensor


def found_in(state: State) -> tuple[Tensor, Tensor]:
    """The place of each slot's copy, int64 [B, Hkv, C], and whether it has one."""
    return places_of(state[WHOLE_AT], rising(state.pos))


def free_places(state: State) -> tuple[Tensor, Tensor]:
    """A place without a token in each head, int64 [B, Hkv, 1], and whether there is one."""
    free = state[WHOLE_AT] < 0
    return free.int().argmax(-1, keepdim=True), free.any(-1, keepdim=True)


def put(k: Tensor, v: Tensor, now: Tensor, valid: Tensor, place: Tensor, state: State, rule: Rule) -> None:
    """Copy a step's token, k [B, Hkv, 1, D], v [B, Hkv, 1, Dv], into a place of each head, int64 [B, Hkv, 1], in place.

    now: int32, its position; valid: bool, where there is one; both broadcastable to [B, Hkv, 1].
    """
    _write({"k": k, "v": v}, now, valid, place, state, rule)


def clear(place: Tensor, goes: Tensor, state: State, rule: Rule) -> None:
    """The tokens in a place of each head, int64 [B, Hkv, 1], lose their copies where they go, bool [B, Hkv, 1]."""
    zero = {half: state[half].new_zeros(1).expand(*place.shape, state[half].shape[3]) for half in coded(rule)}
    _write(zero, place.new_full((), -1), goes, place, state, rule)


def _write(new: dict[str, Tensor], pos: Tensor, where: Tensor, place: Tensor, state: State, rule: Rule) -> None:
    at = state[WHOLE_AT]
    where, pos = where.expand(place.shape), pos.expand(place.shape)
    at.scatter_(2, place, torch.where(where, pos.to(at.dtype), at.gather(2, place)))
    heads = torch.arange(place.numel(), device=place.device)
    rows, written = heads * at.shape[2] + place.flatten(), where.reshape(-1, 1)
    for half in coded(rule):
        target = state[half].view(-1, state[half].shape[3])
        source = new[half].reshape(len(rows), -1)
        target.index_copy_(0, rows, torch.where(written, source, target.index_select(0, rows)))


def keep_chosen(k: Tensor, v: Tensor, pos: Tensor | None, chosen: Tensor, state: State, rule: Rule) -> None:
    """Hold some of a call's keys whole, and no others, in place.

    k [B, Hkv, L, D], v [B, Hkv, L, Dv]; pos: int32 [B, Hkv, L], or None: key l is at position l; chosen: int32
    [B, Hkv, W], which keys, then -1.
    """
    there, index = chosen >= 0, chosen.clamp(min=0).long()
    where = chosen if pos is None else torch.where(there, pos.gather(2, index), -1)
    state[WHOLE_AT].copy_(where)
    for half in coded(rule):
        source = k if half == "k" else v
        picked = source.gather(2, index[..., None].expand(*index.shape, source.shape[3]))
        state[half].copy_(picked.masked_fill_(~there[..., None], 0.0))
