"""ALiBi: positions enter as a bias on the logits, added (MPT) or through baddbmm over [B * H, ..] (Bloom)."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask
from models.styles.style import DIM, HEADS, Projected, Tupled
from torch import Tensor


def slopes() -> Tensor:
    return 2.0 ** -(torch.arange(1, HEADS + 1) * 8.0 / HEADS)


class AlibiAttention(Projected):
    """Bias of distances, [H, S, T]."""

    def __init__(self, index: int) -> None:
        super().__init__(index, HEADS)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[2]
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        y = self.attend(q, k, v, past)
        return self.wo(y.transpose(1, 2).flatten(2)), (k, v)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        return slopes()[:, None, None] * (keys[None, :] - queries[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        length = k.shape[2]
        scores = q @ k.transpose(-2, -1) * self.scale
        scores = scores + self.bias(torch.arange(extra, length), torch.arange(length))
        scores = scores.masked_fill(~causal_mask(q.shape[2], extra), torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


class BloomAttention(AlibiAttention):
    """Bias of key positions, one row for all queries: [B * H, 1, T]."""

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        return slopes()[:, None, None] * keys[None, None, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        b, h, s, _ = q.shape
        length = k.shape[2]
        alibi = self.bias(torch.arange(1), torch.arange(length)).repeat(b, 1, 1)
        query = q.reshape(b * h, s, DIM)
        key = k.reshape(b * h, -1, DIM).transpose(-1, -2)
        value = v.reshape(b * h, -1, DIM)
        scores = torch.baddbmm(alibi, query, key, beta=1.0, alpha=self.scale).view(b, h, s, length)
        scores = scores.masked_fill(~causal_mask(s, extra), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.view(b * h, s, length), value).view(b, h, s, DIM)


class Alibi(Tupled):
    attention = AlibiAttention


class Bloom(Tupled):
    attention = BloomAttention
