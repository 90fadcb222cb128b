"""One tensor [layers, 2, B, H, Tmax, D] that the caller owns, written by narrow().copy_()."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import rotary
from models.styles.style import DIM, KV_HEADS, LAYERS, Projected, Tupled
from torch import Tensor


class StackedAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        layer, start = cache
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, start), rotary(k, start)
        layer[0].narrow(2, start, x.shape[1]).copy_(k)
        layer[1].narrow(2, start, x.shape[1]).copy_(v)
        mask = torch.arange(layer.shape[3]) <= torch.arange(start, start + x.shape[1])[:, None]
        y = self.attend(q, layer[0], layer[1], mask)
        return self.wo(y.transpose(1, 2).flatten(2)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, enable_gqa=True)


class Stacked(Tupled):
    attention = StackedAttention

    def init_cache(self, batch: int, room: int) -> Any:
        return torch.zeros(LAYERS, 2, batch, KV_HEADS, room, DIM)

    def forward(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:  # type: ignore[override]
        return super().forward(ids, [(cache[i], start) for i in range(LAYERS)])[0], cache

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache, start)  # type: ignore[no-any-return]
