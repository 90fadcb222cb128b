"""One step of decode_attend in numbers, read from the cursor once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from kvpass.kernels.budget import budget
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FIRST, FREE, LIVE, SEEN, SHIFT
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.state import State
from torch import Tensor


class HeadRange(NamedTuple):
    """Neighbouring heads first .. last - 1 with equally many slots in use; ragged: one head, whose slot 0 is at row
    `place` of the flattened memory.
    """

    first: int
    last: int
    slots: int
    place: int | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Its used slots of x [B, Hkv, C, D]: [heads, slots, D], a view."""
        if self.place is None:
            return x.view(-1, *x.shape[2:])[self.first : self.last, : self.slots]
        return x.view(-1, x.shape[3])[self.place : self.place + self.slots].unsqueeze(0)

    def cells(self, x: Tensor) -> Tensor:
        """Its used slots of x [B, Hkv, C]: [heads, slots], a view."""
        if self.place is None:
            return x.view(-1, x.shape[2])[self.first : self.last, : self.slots]
        return x.view(-1)[self.place : self.place + self.slots].unsqueeze(0)


class StepFacts(NamedTuple):
    """One step in numbers. Ints where all heads agree, else int64 or bool tensors [B, Hkv, 1]."""

    slots: int
    """Slots in use in the fullest head, the new token's included."""
    ranges: list[HeadRange]
    """Heads of the flattened [B * Hkv], each once, in order."""
    size: int | Tensor
    """Budget, of slots or of tokens held whole."""
    first: int | Tensor
    evicts: bool | Tensor
    """Whether a slot must go."""
    starts: bool
    """Whether this is the first valid token of some row."""
    position: int
    rows: Tensor
    """int64 [B * Hkv], the token's slots in the flattened memory."""
    number: int | Tensor
    """Which of its row's valid tokens this one is, from 0."""
    parted: bool
    """Whether padding stands between tokens of some row."""


def step_facts(cells: list[list[int]], state: State, position: int, plan: Rule) -> StepFacts:
    """What the cursor, as `cells` [B * Hkv][columns], says about the step of a token at `position`."""
    cursor, slots, ragged = state.cursor, state.slots, plan[Ragged].ragged
    live, _, seen, first = cells[0][:4]
    if not ragged and max(c[LIVE] for c in cells) >= slots:
        raise ValueError(f"decode_attend: no room for the token, all {slots} slots of a head are in use")
    places = [i * slots + (c[SHIFT] if ragged else 0) for i, c in enumerate(cells)]
    rows = torch.tensor([at + c[FREE] for at, c in zip(places, cells, strict=True)], device=cursor.device)
    begins = any(c[FIRST] < 0 for c in cells)
    if not begins and not ragged and all(c[LIVE] == live and c[SEEN] == seen and c[FIRST] == first for c in cells):
        size = budget(plan, seen + 1)
        ranges = [HeadRange(0, len(cells), live + 1)]
        parted = position - first != seen
        evicts = live + 1 > size and not plan.demotes
        return StepFacts(live + 1, ranges, size, first, evicts, False, position, rows, seen, parted)

    def shaped(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=cursor.device).view(*cursor.shape[:2], 1)

    used = [c[LIVE] + 1 for c in cells]
    sizes = [budget(plan, c[SEEN] + 1) + (c[EXTRA] if ragged else 0) for c in cells]
    over = [u > s and not plan.demotes for u, s in zip(used, sizes, strict=True)]
    evicts = over[0] if all(o == over[0] for o in over) else shaped(over)
    firsts = [c[FIRST] if c[FIRST] >= 0 else position for c in cells]
    ranges = _head_ranges(used, places, ragged)
    numbers = [c[SEEN] for c in cells]
    parted = any(position - at != n for at, n in zip(firsts, numbers, strict=True))
    number = numbers[0] if len(set(numbers)) == 1 else shaped(numbers)
    return StepFacts(max(used), ranges, shaped(sizes), shaped(firsts), evicts, begins, position, rows, number, parted)


def _head_ranges(used: list[int], places: list[int], ragged: bool) -> list[HeadRange]:
    if ragged:
        return [HeadRange(i, i + 1, n, place) for i, (n, place) in enumerate(zip(used, places, strict=True))]
    ranges, first = [], 0
    for n, same in groupby(used):
        last = first + len(list(same))
        ranges.append(HeadRange(first, last, n))
        first = last
    return ranges
