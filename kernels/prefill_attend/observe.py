"""The second pass of prefill_attend: what each key got of the observed rows. Pure torch.

With the saved log-sum-exp a probability is one exponential, so a block of rows is recomputed, reduced and forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..rule import Rule

if TYPE_CHECKING:
    from .reference import Piece

ROWS = 64
"""Query rows per block."""


def observe(
    piece: Piece, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, watched: Tensor, rule: Rule, stats: Tensor
) -> None:
    """Add the statistics of a piece's watched rows to stats [N, B, Hkv, L].

    q, k whole; lse float32 [b, Hq, rows] and bias (or None) of the piece; watched bool [B, S].
    """
    (top, bottom), (left, right) = piece.rows, piece.cols
    watched = watched[piece.batch, top:bottom]
    seen = watched.any(0).nonzero()
    if not len(seen):
        return
    low, high = int(seen[0]), int(seen[-1]) + 1
    k = k[piece.batch, :, left:right].float()
    batch, heads, keys, dim = k.shape
    target = stats[:, piece.batch, :, left:right]
    even = bool(watched[:, low:high].all())
    for i in range(low, high, ROWS):
        j = min(i + ROWS, high)
        end = j if piece.kind == "causal" else keys
        rows = (q[piece.batch, :, top + i : top + j].float() * scale).reshape(batch, heads, -1, dim)
        logits = (rows @ k[:, :, :end].transpose(-1, -2)).view(batch, heads, -1, j - i, end)
        shown = torch.ones((), dtype=torch.bool, device=q.device).expand(logits.shape)
        if bias is not None:
            part = bias if bias.shape[3] == 1 else bias[:, :, :, i:j]
            logits += part
            shown = (part > float("-inf")).expand(logits.shape)
        if piece.kind == "causal":
            shown = shown.tril(i)
        probs = (logits - lse[:, :, i:j].reshape(batch, heads, -1, j - i, 1)).exp_()
        probs = probs.masked_fill_(~shown, 0.0)
        row = probs.mean(2) if rule.group == "mean" else probs.amax(2)
        weight = watched[:, None, i:j, None]
        for n, name in enumerate(rule.stats):
            if name == "count":
                value = shown.any(2).float()
            else:
                value = row if name == "sum" else row * row
            target[n, :, :, :end] += (value if even else value * weight).sum(2)
