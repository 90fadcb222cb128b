"""Whole copies of a few tokens beside their codes: the newest of a cache, and the first of each row.

A token's code is made when it comes and never again; while it is among the newest, attention reads the copy instead.
A copy's place follows from the token's position, so that slots may move as they like: a row's first `whole_sinks`
positions have the first places, the others take turns. `whole_at` says which position a place holds.
"""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST
from kvpass.kernels.slots.state import State
from torch import Tensor


def place_of(pos: Tensor, first: Tensor, rule: Rule) -> Tensor:
    """Where the copies of tokens at positions pos, int32 [.., n], are if there are any: int64. first: int32 [.., 1 or
    n], of each row, -1: pos is. Not where W is 0.
    """
    storage = rule[Storage]
    turn = torch.full_like(pos, storage.whole_sinks)
    turn = turn + pos % storage.residual if storage.residual else turn
    since = torch.where(first < 0, 0, pos - first)
    place = torch.where((since >= 0) & (since < storage.whole_sinks), since, turn)
    return place.clamp(0, storage.whole - 1).long()


def copies_of(at: Tensor, pos: Tensor, first: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The same, and whether the copies are there, bool. at: the state's `whole_at`, [.., W]."""
    place = place_of(pos, first, rule)
    return place, (at.gather(-1, place) == pos) & (pos >= 0)


def keep_whole(k: Tensor, v: Tensor, position: int | Tensor, state: State, rule: Rule) -> None:
    """Copy the new tokens k [B, Hkv, S, D], v [B, Hkv, S, Dv] at `position` .. (int, or int [1]) that are to be held
    whole, in place. Copies of padding are made too: no slot has their positions.
    """
    storage, new = rule[Storage], {"k": k, "v": v}
    if not storage.whole or not coded(rule):
        return
    count = k.shape[2]
    pos = position + torch.arange(count, dtype=torch.int32, device=k.device)
    targets = [(state[WHOLE_AT], pos.expand(*k.shape[:3]))] + [(state[half], new[half]) for half in coded(rule)]
    newest = min(count, storage.residual)
    if newest:
        places = storage.whole_sinks + (pos[count - newest :] % storage.residual).long()
        for target, source in targets:
            target.index_copy_(2, places, source[:, :, count - newest :])
    if storage.whole_sinks:
        _keep_first(targets, position, count, state, storage.whole_sinks)


def _keep_first(
    targets: list[tuple[Tensor, Tensor]], position: int | Tensor, count: int, state: State, sinks: int
) -> None:
    """Those among each row's first `sinks`."""
    first = state.cursor[..., FIRST, None]
    first = torch.where(first < 0, position, first)  # a step's token is the row's first one
    column = first + torch.arange(sinks, dtype=torch.int32, device=first.device) - position
    here, column = (column >= 0) & (column < count), column.clamp(0, count - 1).long()
    for target, source in targets:
        behind = [1] * (target.dim() - 3)
        shape = (*column.shape, *target.shape[3:])
        picked = source.gather(2, column.view(*column.shape, *behind).expand(shape))
        own = target[:, :, :sinks]
        own.copy_(torch.where(here.view(*here.shape, *behind), picked, own))
