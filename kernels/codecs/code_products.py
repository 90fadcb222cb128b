"""Products with codes of whole numbers, without the numbers that they stand for.

x = low + scale * code, so q x = sum(q) low + scale (q code): only codes are read for each entry, and scales once for a
group. Queries of several groups are multiplied group by group, zero outside of it.
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
    groups, scales, lows = groups_of(width, group), scale.float().mT, low.float().mT
    if groups == 1:
        return torch.addcmul(_dots(queries, codes, bits) * scales, queries.sum(-1, keepdim=True), lows)
    apart = queries[..., None, :] * _members(width, group, queries.device)
    dots: Tensor = _dots(apart.flatten(-3, -2), codes, bits).unflatten(-2, (-1, groups))
    return (dots * scales.unsqueeze(-3)).sum(-2) + apart.sum(-1) @ lows


def _dots(queries: Tensor, codes: Tensor, bits: int) -> Tensor:
    """float32 [.., G, n]: with the codes alone."""
    parts = planes(codes, bits, queries.shape[-1])
    missing = entries(parts) - queries.shape[-1]
    queries = torch.nn.functional.pad(queries, (0, missing)) if missing else queries
    found = [queries[..., first : first + x.shape[-1]] @ x.mT * factor for x, first, factor in parts]
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]


def mixed(weights: Tensor, codes: Tensor, bits: int, scale: Tensor, low: Tensor, width: int, group: int) -> Tensor:
    """float32 [.., G, width]: the same vectors mixed by weights float32 [.., G, n]."""
    groups, lows = groups_of(width, group), weights @ low.float()
    scaled = (weights[..., None, :] * scale.float().mT.unsqueeze(-3)).flatten(-3, -2)
    parts = planes(codes, bits, width)
    if len(parts) == 1:
        whole = scaled @ parts[0].codes
    else:
        whole = scaled.new_zeros(*scaled.shape[:-1], entries(parts))
        for x, first, factor in parts:
            whole[..., first : first + x.shape[-1]].add_(scaled @ x, alpha=factor)
        whole = whole[..., :width]
    if groups == 1:
        return whole + lows
    mine = _members(width, group, weights.device)
    return torch.where(mine, whole.unflatten(-2, (-1, groups)), 0.0).sum(-2) + lows @ mine.float()


def _members(width: int, group: int, device: torch.device) -> Tensor:
    """bool [groups, width]: which entries a group has."""
    of = torch.arange(width, device=device) // group
    return of == torch.arange(groups_of(width, group), device=device)[:, None]
