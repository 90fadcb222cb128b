"""One step of decode_attend in numbers, read from the cursor once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from kvpass.kernels.rule import EXTRA, FIRST, FREE, LIVE, SEEN, SHIFT, Rule
from torch import Tensor


class Run(NamedTuple):
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


class Step(NamedTuple):
    """One step in numbers. Ints where all heads agree, else int64 or bool tensors [B, Hkv, 1]."""

    slots: int
    """Slots in use in the fullest head, the new token's included."""
    runs: list[Run]
    """Heads of the flattened [B * Hkv], each once, in order."""
    size: int | Tensor
    """Budget."""
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


def read_step(cells: list[list[int]], cursor: Tensor, position: int, slots: int, plan: Rule) -> Step:
    """What the cursor, as `cells` [B * Hkv][columns], says about the step of a token at `position`; C = `slots`."""
    live, _, seen, first = cells[0][:4]
    if not plan.ragged and max(c[LIVE] for c in cells) >= slots:
        raise ValueError(f"decode_attend: no room for the token, all {slots} slots of a head are in use")
    places = [i * slots + (c[SHIFT] if plan.ragged else 0) for i, c in enumerate(cells)]
    rows = torch.tensor([at + c[FREE] for at, c in zip(places, cells, strict=True)], device=cursor.device)
    begins = any(c[FIRST] < 0 for c in cells)
    if not begins and not plan.ragged and all(c[LIVE] == live and c[SEEN] == seen and c[FIRST] == first for c in cells):
        size = plan.budget(seen + 1)
        runs = [Run(0, len(cells), live + 1)]
        parted = position - first != seen
        return Step(live + 1, runs, size, first, live + 1 > size, False, position, rows, seen, parted)

    def shaped(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=cursor.device).view(*cursor.shape[:2], 1)

    used = [c[LIVE] + 1 for c in cells]
    sizes = [plan.budget(c[SEEN] + 1) + (c[EXTRA] if plan.ragged else 0) for c in cells]
    over = [u > s for u, s in zip(used, sizes, strict=True)]
    evicts = over[0] if all(o == over[0] for o in over) else shaped(over)
    firsts = [c[FIRST] if c[FIRST] >= 0 else position for c in cells]
    runs = _runs(used, places, plan)
    numbers = [c[SEEN] for c in cells]
    parted = any(position - at != n for at, n in zip(firsts, numbers, strict=True))
    number = numbers[0] if len(set(numbers)) == 1 else shaped(numbers)
    return Step(max(used), runs, shaped(sizes), shaped(firsts), evicts, begins, position, rows, number, parted)


def _runs(used: list[int], places: list[int], plan: Rule) -> list[Run]:
    if plan.ragged:
        return [Run(i, i + 1, n, place) for i, (n, place) in enumerate(zip(used, places, strict=True))]
    runs, first = [], 0
    for n, same in groupby(used):
        last = first + len(list(same))
        runs.append(Run(first, last, n))
        first = last
    return runs
