"""How many slots a state has room for, and states with more of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvpass.kernels.budget import kept, within
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.moves import with_places, with_slots
from kvpass.kernels.slots.state import State


def capacity(rule: Rule, tokens: int) -> int:
    """Slots to allocate: what the budget keeps, one for the incoming token, and up to 2.5 % to grow into; all tokens
    where they are shared out later.
    """
    used = kept(rule, tokens)
    return tokens + 1 if rule[ShareOut].share else used + spare_slots(used)


def spare_slots(kept: int) -> int:
    """Free slots of a head that keeps so many: one for the incoming token, and up to 2.5 % to grow into."""
    return max(1, kept // 40)


def empty_state(rule: Rule, tokens: int, like: torch.Tensor, sizes: Mapping[str, Any]) -> State:
    """State with no live slot and room for `tokens` tokens, on the device and with the dtype of `like`; sizes: B, Hkv,
    D and Dv of the site.
    """
    held = {letter: sizes[own] for letter, own in (("B", "B"), ("H", "Hkv"), ("D", "D"), ("V", "Dv"))}
    if rule.demotes:
        whole = within(rule, tokens)
        held["W"] = whole + spare_slots(whole)
    return State.empty(rule, like, C=capacity(rule, tokens), **held)


def with_room(state: State, kept: int, spare: int | None = None) -> State:
    """The same state if it has room for one token beside `kept` slots, else a copy with so many to spare."""
    if state.slots > kept:
        return state
    with torch.inference_mode(False):
        return with_slots(state, kept + (spare_slots(kept) if spare is None else spare))


def with_room_beside(state: State, whole: int, spare: int | None = None) -> State:
    """The same of places beside the slots, of which `whole` are in use."""
    if state.places > whole:
        return state
    with torch.inference_mode(False):
        return with_places(state, whole + (spare_slots(whole) if spare is None else spare))


def in_place(state: State, other: State) -> State:
    """The other state in the memory of the first one, if it fits."""
    pairs = list(zip(state.tensors(), other.tensors(), strict=True))
    if any(old.shape != new.shape for old, new in pairs):
        return other
    for old, new in pairs:
        old.copy_(new)
    return state
