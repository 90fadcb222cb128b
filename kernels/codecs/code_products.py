"""Products with codes of whole numbers, without the numbers that they stand for.

x = low + scale * code, so q x = sum(q) low + scale (q code): only codes are read for each entry, and scales once for a
group.
"""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.codec import groups_of
from kvpass.kernels.codecs.packing import entries, planes
from torch import Tensor


def products(queries: Tensor, codes: Tensor, bits: int, scale: Tensor, low: Tensor, group: int) -> Tensor:
    """float32 [.., G, n]: queries float32 [.., G, width] times n vectors of packed codes uint8 [.., n, bytes], scale
    and low [.., n, groups].
    """
    width = queries.shape[-1]
    groups, mine = groups_of(width, group), _members(width, group, queries.device)
    apart = queries if groups == 1 else (queries[..., None, :] * mine).flatten(-3, -2)
    parts = planes(codes, bits, width)
    apart = torch.nn.functional.pad(apart, (0, entries(parts) - width))
    dots = torch.zeros((), device=codes.device)
    for plane, first, factor in parts:
        dots = dots + (apart[..., first : first + plane.shape[-1]] * factor) @ plane.mT
    scales, lows = scale.float().mT, low.float().mT
    if groups == 1:
        return torch.addcmul(dots.mul_(scales), queries.sum(-1, keepdim=True), lows)
    scaled: Tensor = dots.unflatten(-2, (-1, groups)).mul_(scales.unsqueeze(-3)).sum(-2)
    return scaled + (queries[..., None, :] * mine).sum(-1) @ lows


def mixed(weights: Tensor, codes: Tensor, bits: int, scale: Tensor, low: Tensor, width: int, group: int) -> Tensor:
    """float32 [.., G, width]: the same vectors mixed by weights float32 [.., G, n]."""
    groups, mine = groups_of(width, group), _members(width, group, weights.device)
    scaled = (weights[..., None, :] * scale.float().mT.unsqueeze(-3)).flatten(-3, -2)
    parts = planes(codes, bits, width)
    whole = scaled.new_zeros(*scaled.shape[:-1], entries(parts))
    for plane, first, factor in parts:
        whole[..., first : first + plane.shape[-1]] += factor * (scaled @ plane)
    whole = whole[..., :width]
    lows = weights @ low.float()
    if groups == 1:
        return whole + lows
    return torch.where(mine, whole.unflatten(-2, (-1, groups)), 0.0).sum(-2) + lows @ mine.float()


def _members(width: int, group: int, device: torch.device) -> Tensor:
    """bool [groups, width]: which entries a group has."""
    of = torch.arange(width, device=device) // group
    return of == torch.arange(groups_of(width, group), device=device)[:, None]
