"""Scores from the rows of an observation window, where a sum over its queries is not enough."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.chance import gumbel_rows
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.smooth import smoothed
from torch import Tensor


def outside(seen: Seen) -> Tensor:
    """Rows [B, Hkv, G, w, L] without the window's own columns."""
    return torch.where(seen.before_window[:, :, None, None], seen.observed, 0.0)


def answered(seen: Seen) -> Tensor:
    """float32 [B, Hkv, G, w, 1]: 1 for queries that are there, 0 where the call has fewer than w."""
    return (seen.observed.sum(-1, keepdim=True) > 0).float()


def window_mean(rows: Tensor, seen: Seen) -> Tensor:
    """[B, Hkv, G, w, L] -> [B, Hkv, G, L]: mean over the window's queries."""
    return rows.sum(3) / answered(seen).sum(3).clamp(min=1)


LIFT = 1e20
"""Added to scores of keys that stay before all others, whatever a value weight makes of them."""


@scorer("window_sum", reads=("statistics",), heads="each")
def window_sum(seen: Seen) -> Tensor:
    """The `sum` that attention emitted in this call, unlike `score: sum` the same while tokens are generated."""
    return seen.statistics["sum"]


@scorer("defensive", reads=("rows",), heads="each")
def defensive(seen: Seen, pool: int = 5, nucleus: float = 0.9) -> Tensor:
    """Worst-case importance with a floor (arXiv 2510.13334, before the value weight).

    Rows are average-pooled and rescaled to their sums; the maximum over group and window, at least the mean of that
    maximum over the keys. Keys of the nucleus (the largest mean probabilities, whose shares sum to less than `nucleus`
    minus the window's own mass) are lifted above all others; at most budget - window of them.
    """
    rows = outside(seen)
    smooth = smoothed(rows, pool) * seen.before_window[:, :, None, None]
    smooth = smooth * (rows.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp(min=1e-30))
    most = smooth.amax((2, 3))
    count = seen.before_window.sum(-1, keepdim=True).clamp(min=1)
    risk = torch.maximum(most, most.sum(-1, keepdim=True) / count)
    return risk + LIFT * _nucleus(rows, seen, nucleus)


def _nucleus(rows: Tensor, seen: Seen, share: float) -> Tensor:
    """bool [B, Hkv, L]"""
    mean = window_mean(rows, seen).mean(2)
    mass = mean.sum(-1, keepdim=True)
    order = mean.argsort(dim=-1, descending=True, stable=True)
    before = (mean / mass.clamp(min=1e-30)).gather(-1, order).cumsum(-1)
    rank = torch.arange(mean.shape[-1], device=mean.device)
    chosen = (before < share - (1 - mass)) & (rank < seen.budget - seen.window)
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & seen.before_window


def cake_preference(seen: Seen) -> Tensor:
    """Entropy times variance over the window's queries, summed over keys and heads: float32 [B] (arXiv 2503.12491, both
    temperatures 1). Spread and shifting attention asks for more slots.
    """
    rows, there = outside(seen), answered(seen)
    entropy = -(rows * (rows + 1e-10).log()).sum((1, 2, 3, 4))
    centred = (rows - window_mean(rows, seen)[:, :, :, None]) * there
    return entropy * (centred.square().sum(3) / (there.sum(3) - 1).clamp(min=1)).sum((1, 2, 3))


@scorer("cake", reads=("rows",), preference=cake_preference, heads="each")
def cake(seen: Seen, gamma: float = 200.0, pool: int = 5) -> Tensor:
    """Mean plus `gamma` times the unbiased variance over the window's queries, average-pooled, group mean
    (arXiv 2503.12491).
    """
    rows, there = outside(seen), answered(seen)
    mean = window_mean(rows, seen)
    variance = ((rows - mean[:, :, :, None]).square() * there).sum(3) / (there.sum(3) - 1).clamp(min=1)
    return smoothed(mean + gamma * variance, pool).mean(2)


@scorer("finch", reads=("rows",), heads="each")
def finch(seen: Seen) -> Tensor:
    """Mean over the window's queries of a_ij times the keys that query sees, group mean (arXiv 2408.00167)."""
    rows = outside(seen)
    queries = rows.shape[3]
    own = seen.end + torch.arange(-queries, 0, device=rows.device)  # positions of the window's queries
    visible = (seen.candidate[..., None, :] & (seen.pos[..., None, :] <= own[..., None])).sum(-1, keepdim=True)
    return window_mean(rows * visible[:, :, None], seen).mean(2)


@scorer("rms", reads=("rows",), heads="each")
def rms(seen: Seen) -> Tensor:
    """Root mean square of a key's probabilities over all query heads of the group and the window's queries that see it
    (arXiv 2602.16284).
    """
    rows = seen.observed
    return (rows.square().sum((2, 3)) / (rows > 0).sum((2, 3)).clamp(min=1)).sqrt()


@scorer("keyformer", reads=("logits", "layer", "places"))
def keyformer(seen: Seen, temperature: float = 1.0) -> Tensor:
    """Sum over the window's queries of softmax((logit + Gumbel noise) / temperature), group mean (arXiv 2403.09054)."""
    noisy = (seen.observed + gumbel_rows(seen)) / temperature
    return noisy.softmax(-1).nan_to_num(0.0).mean(2).sum(2)
