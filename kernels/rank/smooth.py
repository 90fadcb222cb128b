"""Keys among others of a sequence: pooling, granules, spans. Pure torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.rank.allocate import ranks
from kvpass.kernels.rank.places import ordered_by, restored
from kvpass.kernels.rule import Record, Rule, one_of
from torch import Tensor


@dataclass(frozen=True)
class Pool(Record):
    """Smoothing over `pool_size` neighbours: `none`, `avg` or `max`."""

    pool: str = "none"
    pool_size: int = 1

    def check(self) -> None:
        one_of(self, "pool", "none", "avg", "max")


@dataclass(frozen=True)
class Granule(Record):
    """So many neighbouring tokens stay or go together, by the `mean` of their scores or of their `top_half`."""

    granule: int = 1
    granule_by: str = "mean"

    def check(self) -> None:
        one_of(self, "granule_by", "mean", "top_half")


@dataclass(frozen=True)
class Fair(Record):
    """Whether each span that the caller marked keeps its share (arXiv 2510.00231)."""

    fair: bool = False


def pooled(
    value: Tensor, where: Tensor, candidate: Tensor, end: Tensor, rule: Rule, order: Tensor | None = None
) -> Tensor:
    """value [B, Hkv, L] smoothed over neighbours; keys outside the pool keep what they have (SnapKV). where, end:
    places (`kvpass.kernels.rank.places`); order [B, 1, L]: in which keys are neighbours, if not in theirs.
    """
    inside = candidate & (where < end - rule[Observation].window)
    lent = torch.where(inside, value, 0.0 if rule[Pool].pool == "avg" else -torch.inf)
    if order is None:
        return torch.where(inside, smoothed(lent, rule[Pool].pool_size, rule[Pool].pool), value)
    smooth = restored(smoothed(ordered_by(lent, order), rule[Pool].pool_size, rule[Pool].pool), order)
    return torch.where(inside, smooth, value)


def smoothed(x: Tensor, size: int, kind: str = "avg") -> Tensor:
    """x [..., L], the `avg` (zeros beyond the ends count) or `max` of `size` neighbours: same shape."""
    flat = x.reshape(-1, 1, x.shape[-1])
    pool = F.avg_pool1d if kind == "avg" else F.max_pool1d
    return pool(flat, size, 1, size // 2).view(x.shape)


def by_granule(value: Tensor, pos: Tensor, candidate: Tensor, first: Tensor, rule: Rule) -> Tensor:
    """value [B, Hkv, L] -> the same for all keys of a granule: `granule` tokens from the row's first one on.

    The mean over the granule's candidates (ChunkKV, arXiv 2502.00299), or over the better half of them, rounded up
    (WindowKV, arXiv 2503.17922).
    """
    place = torch.where(candidate, (pos - first) // rule[Granule].granule, 0).long()
    count = int(place.max()) + 1
    rank = torch.zeros_like(place)
    if rule[Granule].granule_by == "top_half":
        order = torch.where(candidate, value, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, place.gather(-1, order).argsort(dim=-1, stable=True))
        sorted_place = place.gather(-1, order)
        start = torch.searchsorted(sorted_place, sorted_place)
        within = torch.arange(order.shape[-1], device=order.device) - start
        rank = rank.scatter(-1, order, within)
    size = _sums(candidate.float(), place, count)
    chosen = candidate if rule[Granule].granule_by == "mean" else candidate & (rank < (size.gather(-1, place) + 1) // 2)
    mean = _sums(torch.where(chosen, value, 0.0), place, count) / _sums(chosen.float(), place, count).clamp(min=1)
    return torch.where(candidate, mean.gather(-1, place), value)


def fair_shares(value: Tensor, span: Tensor, candidate: Tensor) -> Tensor:
    """Fair eviction (arXiv 2510.00231): value, span and candidate [B, Hkv, L] -> minus a key's rank in its span as a
    share of the span, so that the best n of all are the best n_X / n of each span X.
    """
    out = torch.zeros_like(value)
    for number in torch.unique(span[candidate]):
        inside = candidate & (span == number)
        rank = ranks(torch.where(inside, value, -torch.inf))
        share = -(rank + 0.5) / inside.sum(-1, keepdim=True).clamp(min=1)
        out = torch.where(inside, share, out)
    return out


def _sums(value: Tensor, place: Tensor, count: int) -> Tensor:
    return value.new_zeros(*value.shape[:-1], count).scatter_add(-1, place, value)
