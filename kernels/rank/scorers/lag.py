"""LagKV: how much tokens stand out against the block that follows them."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from torch import Tensor


@scorer("lag", reads=("keys", "values"), heads="each")
def lag(seen: Seen, sinks: int = 4, block: int = 128, cross: bool = False) -> Tensor:
    """Deviation of min-max-normalised keys and values (arXiv 2504.04704).

    After `sinks` tokens the sequence is cut into blocks. Per channel the next block's minimum and maximum normalise a
    block; the standard deviation over the channels, softmax over the block, mean of keys and values, is a token's
    score; then, unless `cross`, its rank in the block / block (kvpress), so that every block loses the same share.
    The last full block and what follows it have no block to be measured against: they score 1 and more, the newer the
    more, sinks above all.
    """
    out, halves = torch.full_like(seen.pos, 3.0, dtype=torch.float32), (seen.keys, seen.values)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            alive = seen.candidate[b, h].nonzero().flatten()
            body = alive[sinks:]
            blocks = len(body) // block
            out[b, h, body] = 1 + torch.arange(len(body), device=out.device) / max(len(body), 1)
            if blocks < 2:
                continue
            index = body[: blocks * block]
            parts = [_standing(x[b, h, index].unflatten(0, (blocks, block))) for x in halves]
            score = (parts[0] + parts[1]) / 2
            if not cross:
                score = score.argsort(dim=-1, stable=True).argsort(-1).float() / block
            out[b, h, index[: (blocks - 1) * block]] = score.flatten()
    return out


def _standing(x: Tensor) -> Tensor:
    """[blocks, block, D] -> [blocks - 1, block]: softmax over the block of the deviation over the channels."""
    low, high = x[1:].amin(1, keepdim=True), x[1:].amax(1, keepdim=True)
    spread = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return ((x[:-1] - low) / spread).std(-1).softmax(-1)
