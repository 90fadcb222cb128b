"""The slot with the most similar key, or at the nearest place."""

from __future__ import annotations

import torch
from kvpass.kernels.exits.leaving import Leaving
from kvpass.kernels.exits.victim import Targets, Victims
from kvpass.kernels.exits.weights import unit
from kvpass.kernels.rule import Rule
from torch import Tensor

BLOCK = 1024
"""Slots that go, whose cosines to all that stay are held at once."""


def key_of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Of a head's slots that go and of those that stay, which go where: int64 [P] each. Equal cosines: the older."""
    kept = unit(head.kept_keys).mT
    best = [(unit(part) @ kept).argmax(-1) for part in head.gone_keys.split(BLOCK)]
    return _each(head), torch.cat(best)


def position_of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Likewise. Equally near: the older (Elastic Cache, arXiv 2407.18121)."""
    gone, kept = head.gone_places, head.kept_places
    after = torch.searchsorted(kept, gone).clamp(max=len(kept) - 1)
    before = (after - 1).clamp(min=0)
    nearer = (kept[after] - gone).abs() < (gone - kept[before]).abs()
    return _each(head), torch.where(nearer, after, before)


def key_of_step(victims: Victims, rule: Rule) -> Targets:
    """The slot that each head's goes into."""
    cosine = torch.where(victims.kept, victims.cosine, -torch.inf)
    best = victims.kept & (cosine == victims.slots.of(victims.slots.amax(cosine)))
    return Targets(victims, *victims.only(best & (victims.pos == victims.slots.of(victims.least(victims.pos, best)))))


def position_of_step(victims: Victims, rule: Rule) -> Targets:
    """Likewise."""
    away = victims.place - victims.slots.of(victims.cells(victims.place, victims.at))
    rank = 2 * away.abs() + (away > 0).int()
    nearest = victims.slots.of(victims.least(rank, victims.kept))
    return Targets(victims, *victims.only(victims.kept & (rank == nearest)))


def _each(head: Leaving) -> Tensor:
    return torch.arange(len(head.gone), device=head.gone.device)
