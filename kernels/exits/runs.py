"""Runs of neighbours whose keys are alike: what goes, goes into the run's pivot (KVMerger, arXiv 2407.08454)."""

from __future__ import annotations

import torch
from kvpass.kernels.exits.leaving import Leaving
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.exits.weights import cosines
from kvpass.kernels.rank.criterion import UNTOUCHABLE
from kvpass.kernels.rule import Rule
from torch import Tensor


def of_call(head: Leaving, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which go where, int64 [P] each.

    A run goes on while the cosine of a key to the one before it is above `merge_least`; protected tokens are in no run.
    Its pivot is the token of the highest score, of equal ones the oldest; where the pivot goes itself, all are dropped.
    """
    alive = torch.cat([head.kept, head.gone]).sort().values
    free, keys = head.score[alive] < UNTOUCHABLE, head.k[alive].float()
    joined = (cosines(keys[1:], keys[:-1]) > rule[Merge].merge_least) & free[1:] & free[:-1]
    run = torch.cat([joined.new_zeros(1), ~joined]).cumsum(0)
    score = torch.where(free, head.score[alive], -torch.inf)
    best = score.new_full((len(alive),), -torch.inf).scatter_reduce(0, run, score, "amax")
    at = torch.arange(len(alive), device=alive.device)
    first = torch.where(free & (score == best[run]), at, len(alive))
    pivot = torch.full_like(at, len(alive)).scatter_reduce(0, run, first, "amin")[run]
    wanted = torch.cat([alive, alive.new_full((1,), -1)])[pivot][torch.searchsorted(alive, head.gone)]
    target = torch.searchsorted(head.kept, wanted).clamp(max=max(len(head.kept) - 1, 0))
    source = (head.kept[target] == wanted).nonzero().flatten()
    return source, target[source]
