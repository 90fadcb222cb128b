"""nanochat: an object of the host's owns one tensor [L, 2, B, H, T, D], makes it at its first insert, and counts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import rotary
from models.styles.style import DIM, KV_HEADS, LAYERS, Projected, Tupled
from torch import Tensor


class KVCache:
    def __init__(self, batch: int, room: int) -> None:
        self.kv_shape = (LAYERS, 2, batch, KV_HEADS, room, DIM)
        self.kv_cache: Tensor | None = None
        self.pos = 0

    def get_pos(self) -> int:
        return self.pos

    def insert_kv(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv_cache is None:
            self.kv_cache = torch.zeros(self.kv_shape, dtype=k.dtype, device=k.device)
        t0, t1 = self.pos, self.pos + k.size(2)
        self.kv_cache[layer_idx, 0, :, :, t0:t1, :] = k
        self.kv_cache[layer_idx, 1, :, :, t0:t1, :] = v
        key_view = self.kv_cache[layer_idx, 0, :, :, :t1, :]
        value_view = self.kv_cache[layer_idx, 1, :, :, :t1, :]
        if layer_idx == self.kv_cache.size(0) - 1:
            self.pos = t1
        return key_view, value_view


class ChatAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        start = cache.get_pos()
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, start), rotary(k, start)
        k, v = cache.insert_kv(self.index, k, v)
        y = self.attend(q, k, v, None)
        return self.wo(y.transpose(1, 2).contiguous().flatten(2)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        queries, keys = q.size(2), k.size(2)
        if queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if queries == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=False, enable_gqa=True)
        mask = torch.zeros((queries, keys), dtype=torch.bool, device=q.device)
        before = keys - queries
        mask[:, :before] = True
        mask[:, before:] = torch.tril(torch.ones((queries, queries), dtype=torch.bool, device=q.device))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Chat(Tupled):
    attention = ChatAttention

    def init_cache(self, batch: int, room: int) -> Any:
        return KVCache(batch, room)

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        return super().forward(ids, [cache] * LAYERS)[0]

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache), cache
