"""Softcapped logits (Gemma 2): the scale is folded into the queries, tanh bounds the logits, then the mask is added."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import rotary
from models.styles.style import DIM, HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor


class SoftcapAttention(Projected):
    scale = 1.0
    softcap = 5.0

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[2]
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, past) * DIM**-0.5, rotary(k, past)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        hidden = torch.full((x.shape[1], k.shape[2]), torch.finfo(x.dtype).min).triu(past + 1)
        y = self.attend(q, k, v, hidden)
        return self.wo(y.transpose(1, 2).flatten(2)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = scores / self.softcap
        scores = torch.tanh(scores)
        scores = scores * self.softcap
        scores = scores + extra
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


class Softcap(Tupled):
    attention = SoftcapAttention
