"""Attention sinks (gpt-oss): a learned logit of each head joins the softmax and is dropped after it."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask, rotary
from models.styles.style import HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor, nn


class SinkAttention(Projected):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def sink_logits(self) -> Tensor:
        return self.sinks

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[2]
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, past), rotary(k, past)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        y = self.attend(q, k, v, causal_mask(x.shape[1], past))
        return self.wo(y.transpose(1, 2).flatten(2)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        b, h, t, d = k.shape
        group = HEADS // KV_HEADS
        k = k[:, :, None].expand(b, h, group, t, d).reshape(b, h * group, t, d)
        v = v[:, :, None].expand(b, h, group, t, d).reshape(b, h * group, t, d)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scale
        scores = scores + torch.zeros(extra.shape).masked_fill(~extra, float("-inf"))
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        combined = torch.cat([scores, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        probs = torch.softmax(combined, dim=-1, dtype=combined.dtype)
        return torch.matmul(probs[..., :-1], v)


class Sinks(Tupled):
    attention = SinkAttention
