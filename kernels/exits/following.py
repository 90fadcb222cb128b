"""The slots that come next: each takes an even part (CaM, ICML 2024)."""

from __future__ import annotations

import torch
from kvpass.kernels.exits.leaving import Leaving
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.victim import Targets, Victims
from kvpass.kernels.rule import Rule
from torch import Tensor


def of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which go where, int64 [P] each: up to `merge_count` pairs for each slot that goes."""
    start = torch.searchsorted(head.kept, head.gone)
    target = start[:, None] + torch.arange(rule[Merge].merge_count, device=start.device)
    source, _ = there = (target < len(head.kept)).nonzero(as_tuple=True)
    return source, target[there]


def of_step(victims: Victims, rule: Rule) -> Targets:
    """Up to `merge_count` slots for each head's: one after the other, so that heads may have their own numbers."""
    slots, place = victims.slots, victims.place
    last, found = victims.cells(place, victims.at), []
    for _ in range(rule[Merge].merge_count):
        last = victims.least(place, victims.kept & (place > slots.of(last)))
        found.append(victims.only(victims.kept & (place == slots.of(last))))
    at, there = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return Targets(victims, at, there)
