"""Keys and values of a step's heads as attention reads them, whatever slots hold."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.entries import decoded, turned
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.codecs.whole import copies_of, place_of
from kvpass.kernels.decode_attend.step import HeadRange
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FIRST
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from torch import Tensor


def read(state: State, half: str, heads: HeadRange, rule: Rule) -> Tensor:
    """Keys (`k`) or values (`v`) in the used slots of some heads: float32 [heads, slots, width], turned."""
    held = state[half]
    if half not in coded(rule):
        return heads.rows(held).float()
    parts = [heads.rows(state[name]) for name in rule[Storage].code_fields(half)]
    x = decoded(parts, half, held.shape[3], rule)
    if rule[Storage].whole:
        own = slice(heads.first, heads.last)
        at, copies, cursor = (t.flatten(0, 1)[own] for t in (state[WHOLE_AT], held, state.cursor))
        place, there = copies_of(at, heads.cells(state.pos), cursor[:, FIRST, None], rule)
        row, slot = there.nonzero(as_tuple=True)
        x[row, slot] = turned(copies.float(), half, rule)[row, place[row, slot]]
    return x


def read_all(state: State, half: str, slots: Slots, rule: Rule) -> Tensor:
    """The same in all slots, nothing read back: float32 [B, Hkv, C, width], turned; undefined where nothing is."""
    held, pos = state[half], state.pos
    if half not in coded(rule):
        return held.float()
    x = decoded([state[name] for name in rule[Storage].code_fields(half)], half, held.shape[3], rule)
    if not rule[Storage].whole:
        return x
    place = place_of(pos, slots.of(state.cursor[..., FIRST, None]), rule)
    there = (slots.picked(state[WHOLE_AT], place) == pos) & (pos >= 0)
    return torch.where(there[..., None], slots.picked(turned(held.float(), half, rule), place), x)
