"""R-KV: importance of the last queries against redundancy among the keys."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.smooth import smoothed
from torch import Tensor


@scorer("r_kv", reads=("keys", "logits"), heads="each")
def r_kv(seen: Seen, balance: float = 0.1, threshold: float = 0.5, pool: int = 7) -> Tensor:
    """balance * importance - (1 - balance) * redundancy (arXiv 2505.24133).

    Importance: group maximum of the logits, softmax over the keys before the window, mean over its queries,
    max-pooled. Redundancy: mean cosine to the other keys, softmax; for each key its newest match above `threshold`
    does not count, so that the newest of duplicates stays.
    """
    logits = seen.observed.amax(2).masked_fill(~seen.before_window[:, :, None], float("-inf"))
    present = (logits > float("-inf")).any(-1, keepdim=True)
    probs = logits.masked_fill(~present, 0.0).softmax(-1) * present
    importance = probs.sum(2) / present.sum(2).clamp(min=1)
    importance = smoothed(importance * seen.before_window, pool, "max")
    return balance * importance - (1 - balance) * _redundancy(seen, threshold)


def _redundancy(seen: Seen, threshold: float) -> Tensor:
    """float32 [B, Hkv, L], head by head: a similarity matrix is L x L."""
    out, unit = torch.zeros(seen.pos.shape, device=seen.pos.device), torch.nn.functional.normalize(seen.keys, dim=-1)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            alive = seen.candidate[b, h].nonzero().flatten()
            if not len(alive):  # a row of padding
                continue
            keys = unit[b, h, alive]
            cosine = (keys @ keys.mT).fill_diagonal_(0.0)
            close = cosine > threshold
            places = torch.arange(len(alive), device=close.device)
            newest = torch.where(close, places, -1).amax(-1)
            hit = newest >= 0
            cosine[places[hit], newest[hit]] = 0.0
            out[b, h, alive] = cosine.mean(0).softmax(-1)
    return out
