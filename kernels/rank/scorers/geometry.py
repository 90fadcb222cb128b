"""Scores from the geometry of keys: no query is looked at."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen, mean_of
from torch import Tensor


@scorer("knorm", reads=("keys",), pointwise=True, heads="each")
def knorm(seen: Seen) -> Tensor:
    """-||k||_2: keys of small norm get much attention (arXiv 2406.11430)."""
    norm: Tensor = torch.linalg.vector_norm(seen.keys, dim=-1)
    return -norm


@scorer("keydiff", reads=("keys",), heads="each")
def keydiff(seen: Seen) -> Tensor:
    """-cos(k, mean of the unit keys): keys unlike the others stay (arXiv 2504.15364)."""
    keys = torch.nn.functional.normalize(seen.keys, dim=-1)
    anchor = mean_of(keys, seen.candidate)
    return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)
