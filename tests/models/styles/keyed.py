"""A dict of layer to pair that is passed through, and filled by whoever comes first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import causal_mask, rotary
from models.styles.style import LAYERS, Projected, Tupled
from torch import Tensor


class KeyedAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        past = cache[self.index][0].shape[2] if self.index in cache else 0
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, past), rotary(k, past)
        if self.index in cache:
            k = torch.cat([cache[self.index][0], k], dim=2)
            v = torch.cat([cache[self.index][1], v], dim=2)
        cache[self.index] = (k, v)
        y = self.attend(q, k, v, causal_mask(x.shape[1], past))
        return self.wo(y.transpose(1, 2).flatten(2)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, enable_gqa=True)


class Keyed(Tupled):
    attention = KeyedAttention

    def init_cache(self, batch: int, room: int) -> Any:
        return {}

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        return super().forward(ids, [cache] * LAYERS)[0]

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache), cache
