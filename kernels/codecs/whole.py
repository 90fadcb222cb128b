"""Whole copies of a few tokens beside their codes: the newest of each row, and its first.

A token's code is made when it comes and never again; while it is among the newest, attention reads the copy instead.
Tokens are counted as everywhere, each row its own, without padding: number n has place n if it is one of the first
`whole_sinks`, and the others take turns. `whole_at` says which position a place holds, so slots may move as they like.
Copies of tokens chosen by score are in `kvpass.kernels.codecs.chosen`.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from torch import Tensor


def found(at: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Where the copies of tokens at positions pos, int32 [.., n], are: int64, anything if there is none; and whether
    there is one, bool. at: what places hold, int32 [.., 1 or n, W].
    """
    same = pos[..., None] == at
    return same.int().argmax(-1), same.any(-1) & (pos >= 0)


def listed(at: Tensor, pos: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The copies of heads: row of pos, slot and place, int64 [copies] each. pos: int32 [rows, n], of slots in use; at:
    int32 [rows, W]. Reads back.
    """
    sinks = rule[Storage].whole_sinks
    late, none = at[:, sinks:], torch.iinfo(at.dtype).max
    here = torch.zeros_like(pos, dtype=torch.bool)
    if late.shape[1]:
        here |= pos >= late.masked_fill(late < 0, none).amin(-1, keepdim=True)
    if sinks:
        here |= pos <= at[:, :sinks].amax(-1, keepdim=True)
    row, slot = here.nonzero(as_tuple=True)
    place, there = found(at[row], pos[row, slot])
    return row[there], slot[there], place[there]


def counted(pos: Tensor, first: int, newest: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """`listed` of rows without padding between their tokens, which stand at first .. newest: places follow from
    positions.
    """
    storage = rule[Storage]
    sinks, here = storage.whole_sinks, pos > newest - storage.residual
    if sinks:
        here |= pos < first + sinks
    row, slot = here.nonzero(as_tuple=True)
    number = pos[row, slot].long() - first
    place = late_place(number, storage)
    return row, slot, torch.where(number < sinks, number, place) if sinks else place


def late_place(number: Any, storage: Storage) -> Any:
    """The place of a token that is not one of its row's first, by its number, int or int tensor; `whole`: none."""
    return number % storage.residual + storage.whole_sinks if storage.residual else storage.whole


def keep_newest(k: Tensor, v: Tensor, position: int, number: int, state: State, rule: Rule) -> None:
    """`keep_whole` of one token [B, Hkv, 1, ..], the same number of all rows."""
    storage = rule[Storage]
    place = number if number < storage.whole_sinks else late_place(number, storage)
    if place == storage.whole:
        return
    state[WHOLE_AT][..., place] = position
    for half in coded(rule):
        state[half][:, :, place] = (k if half == "k" else v)[:, :, 0]


def keep_whole(k: Tensor, v: Tensor, pos: Tensor, valid: Tensor, seen: Tensor, state: State, rule: Rule) -> None:
    """Copy those of the new tokens k [B, Hkv, S, D], v [B, Hkv, S, Dv] that are to be held whole, in place.

    pos: int32 [S]; valid: bool [B, S], which are tokens; seen: int [B, 1], tokens of each row before these.
    """
    storage = rule[Storage]
    if not storage.whole or not coded(rule):
        return
    number = _numbers(seen + valid.sum(-1, keepdim=True) - 1, storage)
    fresh = (number >= seen) & (number >= 0)
    order = (~valid).int().argsort(dim=-1, stable=True) if valid.shape[1] > 1 else torch.zeros_like(number)
    column = order.gather(-1, (number - seen).clamp(0, order.shape[-1] - 1))
    _put(state[WHOLE_AT], pos[column].to(torch.int32)[:, None], fresh)
    for half in coded(rule):
        source = k if half == "k" else v
        index = column[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3])
        _put(state[half], source.gather(2, index), fresh)


def _numbers(last: Tensor, storage: Storage) -> Tensor:
    """Which of a row's tokens each place is for, int64 [B, W], -1: none. last: int [B, 1], the number of the newest."""
    place = torch.arange(storage.whole, device=last.device)
    first = torch.where(place <= last, place, -1)
    if not storage.residual:
        return first
    turn = last - (last - (place - storage.whole_sinks)) % storage.residual
    return torch.where(place < storage.whole_sinks, first, torch.where(turn >= storage.whole_sinks, turn, -1))


def _put(target: Tensor, new: Tensor, fresh: Tensor) -> None:
    """New contents [B, Hkv or 1, W, ..] into the places that are fresh, bool [B, W]."""
    target.copy_(torch.where(fresh.view(len(fresh), 1, -1, *[1] * (target.dim() - 3)), new, target))
