"""Buffers without a write in place, as code for accelerators has it: one token goes in by a one-hot of its position,
with `where` or as a product; a prompt by a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.styles.style import DIM, KV_HEADS, LAYERS, Projected, Tupled
from torch import Tensor


def turned(x: Tensor, at: Tensor) -> Tensor:
    """Rotate [B, H, S, D] by positions [S]."""
    angle = at[:, None] * 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class BlendedAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        keys, values, at = cache
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = turned(q, at), turned(k, at)
        keys, values = self.written(keys, k, at), self.written(values, v, at)
        y = self.attend(q, keys, values, torch.arange(keys.shape[2]) <= at[:, None])
        return self.wo(y.transpose(1, 2).flatten(2)), (keys, values)

    def written(self, buffer: Tensor, new: Tensor, at: Tensor) -> Tensor:
        if new.shape[2] > 1:
            return buffer.index_copy(2, at, new)
        return self.blended(buffer, new, torch.arange(buffer.shape[2]) == at)

    def blended(self, buffer: Tensor, new: Tensor, hit: Tensor) -> Tensor:
        return torch.where(hit[:, None], new, buffer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, enable_gqa=True)


class ProductAttention(BlendedAttention):
    def blended(self, buffer: Tensor, new: Tensor, hit: Tensor) -> Tensor:
        one_hot = hit.to(buffer.dtype)[None, None, :, None]
        return buffer * (1 - one_hot) + new * one_hot


class Blended(Tupled):
    attention = BlendedAttention

    def init_cache(self, batch: int, room: int) -> Any:
        return [tuple(torch.zeros(batch, KV_HEADS, room, DIM) for _ in range(2)) for _ in range(LAYERS)]

    def forward(self, ids: Tensor, cache: Any, at: Tensor) -> tuple[Tensor, Any]:
        return super().forward(ids, [(keys, values, at) for keys, values in cache])

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache, torch.arange(start, start + ids.shape[1]))


class Product(Blended):
    attention = ProductAttention
