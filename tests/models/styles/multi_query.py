"""Multi-query attention as its paper writes it: keys and values [B, T, D], without an axis of heads, in einsums."""

from __future__ import annotations

from typing import Any

import torch
from models.plain import causal_mask, rotary
from models.styles.style import Projected, Tupled
from torch import Tensor


class HeadlessAttention(Projected):
    def __init__(self, index: int) -> None:
        super().__init__(index, 1)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[1]
        q = rotary(self.new(x)[0].transpose(1, 2), past)
        k, v = rotary(self.wk(x).unsqueeze(1), past).squeeze(1), self.wv(x)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=1), torch.cat([cache[1], v], dim=1)
        y = self.attend(q, k, v, causal_mask(x.shape[1], past))
        return self.wo(y.transpose(1, 2).flatten(2)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        logits = torch.einsum("bhnk,bmk->bhnm", q, k) * self.scale
        weights = torch.softmax(logits + torch.where(extra, 0.0, torch.finfo(logits.dtype).min), dim=-1)
        return torch.einsum("bhnm,bmv->bhnv", weights, v)


class Headless(Tupled):
    attention = HeadlessAttention
