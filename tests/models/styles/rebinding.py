"""Caches [B, T, H, D] in module attributes, rebound by every call to a cat; they begin without tokens."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask, rotary
from models.styles.style import DIM, HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor


class RebindingAttention(Projected):
    tokens_first = True

    def reset(self, batch: int) -> None:
        self.keys = self.values = torch.zeros(batch, 0, KV_HEADS, DIM)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        past = self.keys.shape[1]
        q, k, v = self.new(x)
        q, k = (rotary(t.transpose(1, 2), past).transpose(1, 2) for t in (q, k))
        self.keys = torch.cat((self.keys, k), dim=1)
        self.values = torch.cat((self.values, v), dim=1)
        y = self.attend(q, self.keys, self.values, causal_mask(x.shape[1], past))
        return self.wo(y.flatten(2)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * self.scale
        scores = torch.where(extra, scores, torch.finfo(scores.dtype).min)
        return (scores.softmax(dim=-1) @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


class Rebinding(Tupled):
    attention = RebindingAttention

    def init_cache(self, batch: int, room: int) -> Any:
        for layer in self.attentions():
            layer.reset(batch)
        return self

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids)[0], self
