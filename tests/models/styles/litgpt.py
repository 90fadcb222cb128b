"""litgpt: buffers for the largest batch, of which a call takes its rows; written by index_copy_, read up to an int that
the host knows, under rows of a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.styles.gpt_fast import apply_rotary_emb, precompute_freqs_cis
from models.styles.style import DIM, KV_HEADS, Projected, Tupled
from torch import Tensor, nn


class KVCache(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape), persistent=False)
        self.register_buffer("v", torch.zeros(shape), persistent=False)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bs = k.size(0)
        return (
            self.k[:bs, ...].index_copy_(-2, input_pos, k),
            self.v[:bs, ...].index_copy_(-2, input_pos, v),
        )


class LitAttention(Projected):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.kv_cache: Any = None

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, None]:
        freqs_cis, mask, input_pos, input_pos_maxp1 = cache
        q, k, v = self.new(x)
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        k, v = self.kv_cache(input_pos, k.transpose(1, 2), v.transpose(1, 2))
        if input_pos_maxp1 is not None:
            k, v = k[..., :input_pos_maxp1, :], v[..., :input_pos_maxp1, :]
            mask = mask[..., :input_pos_maxp1]
        y = self.attend(q.transpose(1, 2), k, v, mask)
        return self.wo(y.transpose(1, 2).reshape(*x.shape[:2], -1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, scale=self.scale, enable_gqa=True)


class Lit(Tupled):
    """The whole buffers are read."""

    attention = LitAttention
    knows_the_end = False

    def init_cache(self, batch: int, room: int) -> Any:
        for layer in self.attentions():
            layer.kv_cache = KVCache((batch, KV_HEADS, room, DIM))
        self.register_buffer(
            "mask_cache", torch.ones(room, room, dtype=torch.bool).tril()[None, None], persistent=False
        )
        self.register_buffer("freqs_cis", precompute_freqs_cis(room), persistent=False)
        return self

    def forward(self, idx: Tensor, input_pos: Tensor, input_pos_maxp1: int | None = None) -> Tensor:
        freqs_cis = self.freqs_cis.index_select(0, input_pos)
        mask = self.mask_cache.index_select(2, input_pos)
        x = self.embed(idx)
        for attention, feed in zip(self.attention_layers, self.feed_forward, strict=True):
            x = x + attention(x, (freqs_cis, mask, input_pos, input_pos_maxp1))[0]
            x = x + feed(x)
        return self.head(x)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        end = start + ids.shape[1]
        return self(ids, torch.arange(start, end), end if self.knows_the_end else None), self


class LitToTheEnd(Lit):
    """Up to where the new tokens end."""

    knows_the_end = True
