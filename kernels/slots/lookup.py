"""Places of a table beside the slots, `at` [.., W]: which position each holds, -1 none. Slots are in order of position.

So they are while none of them leaves: where the table says which tokens are held in another way too.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEHIND = 2**31 - 1
"""Above every position: where empty slots stand behind the others."""


def rising(pos: Tensor) -> Tensor:
    """Positions of a state's slots, int32, with the empty ones, which lie behind, above all others."""
    return torch.where(pos < 0, BEHIND, pos)


def slots_at(at: Tensor, pos: Tensor) -> Tensor:
    """The slots of positions at [.., W], int64: any of an empty place. pos: int32 [.., n], rising. Reads back."""
    if bool((pos[..., -1] - pos[..., 0] == pos.shape[-1] - 1).all()):  # no token between them is missing
        return (at - pos[..., :1]).long().clamp_(min=0)
    return torch.searchsorted(pos.contiguous(), at.contiguous())


def places_of(at: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Which place holds the token of each slot, int64 [.., n], and whether one does. pos: int32 [.., n], rising, below
    0 where a slot is empty, or `rising`. Reads nothing back.
    """
    slot = torch.searchsorted(pos.contiguous(), at.contiguous())
    place = torch.arange(at.shape[-1], device=at.device).expand_as(at)
    none = pos.shape[-1]
    found = place.new_full((*pos.shape[:-1], none + 1), -1).scatter_(-1, torch.where(at < 0, none, slot), place)
    return found[..., :none].clamp(min=0), found[..., :none] >= 0
