"""Reference of select_slots in torch."""

from __future__ import annotations

import torch
from kvpass.kernels.slots.cursor import LIVE
from torch import Tensor


def select_slots_reference(score: Tensor, cursor: Tensor, capacity: int) -> Tensor:
    """See `kvpass.kernels.select_slots.select_slots`."""
    length = score.shape[-1]
    live = cursor[..., LIVE, None]
    # Stable and descending: equal scores stay in index order, so the older one comes first.
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    rank = torch.arange(order.shape[-1], device=score.device)
    chosen = order.masked_fill_(rank >= live, length).sort(-1).values.int()
    chosen = chosen.masked_fill_(chosen == length, -1)
    out = chosen.new_full((*score.shape[:2], capacity), -1)
    out[..., : chosen.shape[-1]] = chosen
    return out
