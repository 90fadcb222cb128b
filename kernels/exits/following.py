"""The slots that come next: each takes an even part (CaM, ICML 2024)."""

from __future__ import annotations

import torch
from kvpass.kernels.exits.leaving import Leaving
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.victim import BEYOND, Victims
from kvpass.kernels.rule import Rule
from torch import Tensor


def of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which go where, int64 [P] each: up to `merge_count` pairs for each slot that goes."""
    start = torch.searchsorted(head.kept, head.gone)
    target = start[:, None] + torch.arange(rule[Merge].merge_count, device=start.device)
    source, _ = there = (target < len(head.kept)).nonzero(as_tuple=True)
    return source, target[there]


def of_step(victims: Victims, rule: Rule) -> Tensor:
    """bool [B, Hkv, C]"""
    slots, place = victims.slots, victims.place
    later = victims.kept & (place > slots.of(victims.own(place)))
    rank = torch.full_like(slots.sum(later), rule[Merge].merge_count - 1)
    last = slots.ranked(torch.where(later, place, BEYOND), rank)
    return later & (place <= slots.of(last))
