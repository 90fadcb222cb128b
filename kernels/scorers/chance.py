"""Scores by chance: the same for the same seed, layer, head and position, on every device."""

from __future__ import annotations

import torch
from kvpass.kernels.scorers.registry import Seen, scorer
from torch import Tensor

_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
"""Shifts and factors of lowbias32 (C. Wellons, hash-prospector)."""


def uniform(seen: Seen, salt: int = 0) -> Tensor:
    """Numbers above 0 and below 1, float32 [B, Hkv, L]: a hash of seed, layer, head and position from the row's first
    token on, so that padding changes nothing.
    """
    heads = torch.arange(seen.pos.shape[1], device=seen.pos.device)[:, None]
    place = (seen.pos - seen.first).long()
    x = place + 0x9E3779B1 * (heads + 1) + 0x85EBCA77 * (seen.layer + 1) + 0xC2B2AE3D * (seen.seed + salt + 1)
    x = x & 0xFFFFFFFF
    for shift, factor in _MIX:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x >> 8).float() + 0.5) / 2**24


def gumbel(seen: Seen) -> Tensor:
    """Independent standard Gumbel numbers, float32 [B, Hkv, L]: adding them to log weights and taking the largest
    samples without replacement.
    """
    return -(-uniform(seen, salt=7).log()).log()


@scorer("random", pointwise=True)
def random(seen: Seen) -> Tensor:
    """A uniform number: the baseline that every policy must beat."""
    return uniform(seen)
