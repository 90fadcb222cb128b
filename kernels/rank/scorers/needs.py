"""Scores that say which keys a layer or a head needs at all, for policies with a threshold and no budget."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.allocate import ranks
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.scorers.window import window_mean
from torch import Tensor


@scorer("lazy", reads=("rows",))
def lazy(seen: Seen, sinks: int = 4, recent: int = 1024, most: float = 0.9) -> Tensor:
    """Above 1 in a layer that looks far back, the newer the more; 0 in a lazy one, whose observed queries give more
    than `most` of their attention, mean of all heads, to the first `sinks` and the last `recent` keys (SimLayerKV,
    arXiv 2410.13846).
    """
    near = (seen.pos < seen.first + sinks) | (seen.pos >= seen.end - recent)
    mass = window_mean(seen.observed * near[:, :, None, None], seen).sum(-1).mean((1, 2))
    place = (seen.pos - seen.first) / (seen.end - seen.first).clamp(min=1)
    return torch.where((mass > most)[:, None, None], 0.0, 1 + place)


@scorer("recovery", reads=("rows", "marks", "places"), heads="each")
def recovery(seen: Seen, least: float = 0.9, sinks: int = 4, hitters: float = 0.3, recent: float = 0.3) -> Tensor:
    """Above 1 for what a head needs to recover `least` of the attention of the observed queries, at most 0 for the
    rest (FastGen, arXiv 2310.01801).

    Each head takes the first set that recovers enough: marked tokens and sinks; and the share `hitters` of keys with
    the most attention; and the share `recent` of the latest; or all.
    """
    mass = window_mean(seen.observed, seen).mean(2)
    total = seen.candidate.sum(-1, keepdim=True)
    kept = seen.marked | (seen.pos < seen.first + sinks)
    heavy = ranks(torch.where(seen.candidate, mass, -1.0)) < (hitters * total).long()
    late = seen.pos >= seen.end - (recent * total).long()
    needed = torch.ones_like(kept)
    for some in (kept | heavy | late, kept | heavy, kept):
        enough = (mass * some).sum(-1, keepdim=True) >= least * mass.sum(-1, keepdim=True)
        needed = torch.where(enough, some, needed)
    return torch.where(needed, 1 + mass, mass - 1)
