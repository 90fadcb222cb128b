"""torchtune: a KVCache module of buffers with a buffer of positions, looked at anew for keys and values, then moved on;
a mask that the host makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import rotary
from models.styles.style import DIM, HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor, nn


class KVCache(nn.Module):
    def __init__(self, batch_size: int, max_seq_len: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("cache_pos", torch.arange(0, max_seq_len), persistent=False)

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        seq_len = k_val.shape[2]
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, self.cache_pos[:seq_len]] = k_val
        v_out[:, :, self.cache_pos[:seq_len]] = v_val
        self.cache_pos.add_(seq_len)
        return k_out, v_out


class TunedAttention(Projected):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.kv_cache: Any = None

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        start, mask = cache
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, start), rotary(k, start)
        k, v = self.kv_cache.update(k, v)
        y = self.attend(q, k, v, mask)
        return self.wo(y.transpose(1, 2).contiguous().flatten(2)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        sizes = (q.shape[0], KV_HEADS, HEADS // KV_HEADS, k.shape[2], DIM)
        k, v = (t.unsqueeze(2).expand(sizes).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, dropout_p=0.0, is_causal=False)


class Tuned(Tupled):
    attention = TunedAttention

    def init_cache(self, batch: int, room: int) -> Any:
        for layer in self.attentions():
            layer.kv_cache = KVCache(batch, room, KV_HEADS, DIM)
        self.causal_mask = torch.tril(torch.ones(room, room, dtype=torch.bool))
        return self

    def forward(self, ids: Tensor, mask: Tensor, input_pos: int) -> Tensor:
        x = self.embed(ids)
        for attention, feed in zip(self.attention_layers, self.feed_forward, strict=True):
            x = x + attention(x, (input_pos, mask[:, None]))[0]
            x = x + feed(x)
        return self.head(x)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        mask = self.causal_mask[None, start : start + ids.shape[1]]
        return self(ids, mask, start), self
