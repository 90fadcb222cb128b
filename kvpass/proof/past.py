"""A past as dense tensors, and the same past in slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.state import State


def dense_past(state: State, rule: Rule, new: Tensor, position: int, half: int) -> Tensor:
    """Keys (half 0) or values of all positions before `position`, `[B, Hkv, P, D]`: live ones, and noise of the size of
    the new ones.
    """
    pos, used = state.pos, state.used()
    slots = entries_of(state, "kv"[half], rule)
    size = new.float().square().mean().sqrt().nan_to_num(1.0)
    noise = torch.randn(*pos.shape[:2], position + 1, slots.shape[3], generator=torch.Generator().manual_seed(half))
    past = (noise.to(slots.device) * size).to(slots.dtype)
    index = torch.where(used, pos, position).long()[..., None].expand_as(slots)
    return past.scatter(2, index, torch.where(used[..., None], slots, 0.0))[:, :, :-1]


def all_slots(k: Tensor, v: Tensor, rule: Rule, room: int) -> State:
    """A state with all positions of a dense past in random slots, the hole anywhere, and room; empties are NaN."""
    batch, heads, past, _ = k.shape
    slots = past + 1 + room
    order = torch.rand(batch, heads, past + 1, generator=torch.Generator().manual_seed(7)).argsort(-1).to(k.device)
    order, free = order[..., :-1], order[..., -1]
    state = State.empty(rule, k, B=batch, H=heads, C=slots, D=k.shape[3], V=v.shape[3])
    state.pos.scatter_(2, order, torch.arange(past, dtype=torch.int32, device=k.device).expand(batch, heads, past))
    columns: dict[int, Any] = {LIVE: past, FREE: free, SEEN: past, FIRST: 0 if past else -1}
    for column, value in columns.items():
        state.cursor[..., column] = value
    return state.replaced(k=_in_slots(k, order, slots), v=_in_slots(v, order, slots))


def _in_slots(dense: Tensor, order: Tensor, slots: int) -> Tensor:
    held = dense.new_full((*dense.shape[:2], slots, dense.shape[3]), float("nan"))
    return held.scatter_(2, order[..., None].expand_as(dense), dense)
