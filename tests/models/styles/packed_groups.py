"""Query heads of one KV head on an axis of their own: [B, Hkv, G, S, D] times [B, Hkv, 1, T, D]; a cache of dicts."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask, rotary
from models.styles.style import DIM, HEADS, Projected, Tupled
from torch import Tensor


class PackedAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache["keys"].shape[2]
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, past), rotary(k, past)
        if cache is not None:
            k, v = torch.cat([cache["keys"], k], dim=2), torch.cat([cache["values"], v], dim=2)
        y = self.attend(q, k, v, causal_mask(x.shape[1], past))
        return self.wo(y.transpose(1, 2).flatten(2)), {"keys": k, "values": v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        b, _, s, _ = q.shape
        q = q.view(b, self.kv_heads, HEADS // self.kv_heads, s, DIM) * self.scale
        scores = q @ k.unsqueeze(2).transpose(-1, -2)
        scores = scores.masked_fill(extra.logical_not(), float("-inf"))
        return (scores.softmax(-1) @ v.unsqueeze(2)).view(b, HEADS, s, DIM)


class Packed(Tupled):
    attention = PackedAttention


class MultiQuery(Tupled):
    """One KV head for all."""

    attention = PackedAttention

    def __init__(self) -> None:
        super().__init__(kv_heads=1)
