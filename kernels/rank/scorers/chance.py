"""Scores by chance: the same for the same seed, layer, head and position, on every device."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from torch import Tensor

_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
"""Shifts and factors of lowbias32 (C. Wellons, hash-prospector)."""


def uniform(seen: Seen, salt: int = 0) -> Tensor:
    """Numbers above 0 and below 1, float32 [B, Hkv, L]: a hash of seed, layer, head and position from the row's first
    token on, so that padding changes nothing.
    """
    return _hashed(_places(seen, _heads(seen)[:, None], salt))


def drawn(place: Tensor, head: Tensor | int, layer: int, seed: int) -> Tensor:
    """The same for places that no scorer sees, int64 of any shape; head: what broadcasts to it."""
    return _hashed(_cell(place, head, layer, seed))


def gumbel(seen: Seen) -> Tensor:
    """Independent standard Gumbel numbers, float32 [B, Hkv, L]: adding them to log weights and taking the largest
    samples without replacement.
    """
    return -(-uniform(seen, salt=7).log()).log()


def gumbel_rows(seen: Seen) -> Tensor:
    """The same for each query of the window, float32 [B, Hkv, G, w, L]; the last query of a row is number 0."""
    _, heads, group, queries, _ = seen.observed.shape
    device = seen.pos.device
    head = (torch.arange(heads * group, device=device) + seen.heads_before * group).view(heads, group, 1, 1)
    query = torch.arange(queries - 1, -1, -1, device=device)[:, None]
    x = _places(seen, 0, 13)[:, :, None, None] + 0x9E3779B1 * (head + 1) + 0x27D4EB2F * query
    return -(-_hashed(x).log()).log()


def gaussian(seen: Seen, rows: int, columns: int) -> Tensor:
    """Independent standard normal numbers (Box and Muller), alike for all sequences: float32 [Hkv, rows, columns]."""
    device = seen.pos.device
    cell = torch.arange(2 * rows * columns, device=device).view(2, 1, rows, columns)
    head = _heads(seen)[:, None, None]
    seed = 0x85EBCA77 * (seen.layer + 1) + 0xC2B2AE3D * (seen.seed + 20)
    first, second = _hashed(cell + 0x9E3779B1 * (head + 1) + seed)
    out: Tensor = (-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()
    return out


def _heads(seen: Seen) -> Tensor:
    """Numbers of the KV heads in their layer, int64 [Hkv]."""
    return torch.arange(seen.pos.shape[1], device=seen.pos.device) + seen.heads_before


def _places(seen: Seen, head: Tensor | int, salt: int) -> Tensor:
    """int64 [B, Hkv, L]"""
    return _cell((seen.pos - seen.first).long(), head, seen.layer, seen.seed + salt)


def _cell(place: Tensor, head: Tensor | int, layer: int, seed: int) -> Tensor:
    return place + 0x9E3779B1 * (head + 1) + 0x85EBCA77 * (layer + 1) + 0xC2B2AE3D * (seed + 1)


def _hashed(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    for shift, factor in _MIX:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x >> 9).float() + 0.5) / 2**23  # exact, so never 0 nor 1


@scorer("random", reads=("layer", "places"), pointwise=True)
def random(seen: Seen) -> Tensor:
    """A uniform number: the baseline that every policy must beat."""
    return uniform(seen)
