"""LLMs from scratch: a cache in buffers that begin as None and are rebound, with a pointer on the module; or in an
object with a list of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from models.plain import rotary
from models.styles.style import DIM, HEADS, KV_HEADS, LAYERS, Projected, Tupled
from torch import Tensor


class PointerAttention(Projected):
    """As the GPT chapter: the mask's rows are found by the pointer, which each call moves on."""

    def __init__(self, index: int) -> None:
        super().__init__(index, HEADS)
        self.register_buffer("mask", torch.triu(torch.ones(128, 128), diagonal=1), persistent=False)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)
        self.ptr_current_pos = 0

    def reset_cache(self) -> None:
        self.cache_k, self.cache_v = None, None
        self.ptr_current_pos = 0

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        b, num_tokens, _ = x.shape
        queries, keys_new, values_new = self.new(x)
        if self.cache_k is None:
            self.cache_k, self.cache_v = keys_new, values_new
        else:
            self.cache_k = torch.cat([self.cache_k, keys_new], dim=1)
            self.cache_v = torch.cat([self.cache_v, values_new], dim=1)
        keys, values = self.cache_k.transpose(1, 2), self.cache_v.transpose(1, 2)
        first = self.ptr_current_pos
        mask = self.mask.bool()[first : first + num_tokens, : keys.shape[2]]
        self.ptr_current_pos += num_tokens
        y = self.attend(queries.transpose(1, 2), keys, values, mask)
        return self.wo(y.transpose(1, 2).contiguous().view(b, num_tokens, -1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        attn_scores = q @ k.transpose(2, 3)
        attn_scores.masked_fill_(extra, -torch.inf)
        attn_weights = torch.softmax(attn_scores / k.shape[-1] ** 0.5, dim=-1)
        return attn_weights @ v


class Pointer(Tupled):
    attention = PointerAttention

    def __init__(self) -> None:
        super().__init__()
        self.pos_emb = torch.nn.Embedding(128, HEADS * DIM)
        self.current_pos = 0

    def init_cache(self, batch: int, room: int) -> Any:
        for layer in self.attentions():
            layer.reset_cache()
        self.current_pos = 0
        return self

    def forward(self, ids: Tensor) -> Tensor:
        seq_len = ids.shape[1]
        pos_ids = torch.arange(self.current_pos, self.current_pos + seq_len, device=ids.device)
        self.current_pos += seq_len
        x = self.embed(ids) + self.pos_emb(pos_ids).unsqueeze(0)
        for attention, feed in zip(self.attention_layers, self.feed_forward, strict=True):
            x = x + attention(x, None)[0]
            x = x + feed(x)
        return self.head(x)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids), self


class KVCache:
    """Pairs by layer."""

    def __init__(self, n_layers: int) -> None:
        self.cache: list[Any] = [None] * n_layers

    def get(self, layer_idx: int) -> Any:
        return self.cache[layer_idx]

    def update(self, layer_idx: int, value: Any) -> None:
        self.cache[layer_idx] = value


class ListedAttention(Projected):
    """As the Qwen chapter: keys are cached rotated, for the KV heads only."""

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        start, past, mask = cache
        queries, keys_new, values_new = (t.transpose(1, 2) for t in self.new(x))
        queries, keys_new = rotary(queries, start), rotary(keys_new, start)
        if past is not None:
            prev_k, prev_v = past
            keys = torch.cat([prev_k, keys_new], dim=2)
            values = torch.cat([prev_v, values_new], dim=2)
        else:
            keys, values = keys_new, values_new
        y = self.attend(queries, keys, values, mask)
        return self.wo(y.transpose(1, 2).flatten(2)), (keys, values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        attn_scores = (q @ k.transpose(2, 3)).masked_fill(extra, -torch.inf)
        return torch.softmax(attn_scores / DIM**0.5, dim=-1) @ v


class Listed(Tupled):
    attention = ListedAttention

    def __init__(self) -> None:
        super().__init__()
        self.current_pos = 0

    def init_cache(self, batch: int, room: int) -> Any:
        self.current_pos = 0
        return KVCache(LAYERS)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        x, num_tokens = self.embed(ids), ids.shape[1]
        pos_start = self.current_pos
        pos_end = pos_start + num_tokens
        self.current_pos = pos_end
        mask = torch.triu(torch.ones(pos_end, pos_end, dtype=torch.bool), diagonal=1)[pos_start:pos_end, :pos_end]
        for i, (attention, feed) in enumerate(zip(self.attention_layers, self.feed_forward, strict=True)):
            y, pair = attention(x, (pos_start, cache.get(i), mask[None, None]))
            cache.update(i, pair)
            x = x + y
            x = x + feed(x)
        return self.head(x)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache), cache
