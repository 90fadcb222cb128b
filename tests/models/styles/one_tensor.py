"""Keys and values in one cached tensor: the slice of a fused projection that holds both, kept as it is, [B, T, 2 H D];
or side by side in each head's entries, [B, T, H, 2 D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import causal_mask
from models.styles.style import DIM, HEADS, KV_HEADS, VOCABULARY, WIDTH, Attention, Tupled
from torch import Tensor, nn


class FusedAttention(Attention):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.wqkv = nn.Linear(WIDTH, WIDTH + 2 * KV_HEADS * DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache.shape[1]
        q, kv = self.wqkv(x).split([WIDTH, 2 * KV_HEADS * DIM], dim=-1)
        q = q.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        kv = self.grown(cache, kv)
        k, v = self.taken_apart(kv)
        y = self.attend(q, k.transpose(1, 2), v.transpose(1, 2), causal_mask(x.shape[1], past))
        return self.wo(y.transpose(1, 2).flatten(2)), kv

    def grown(self, cache: Any, kv: Tensor) -> Tensor:
        return kv if cache is None else torch.cat([cache, kv], dim=1)

    def taken_apart(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv.chunk(2, dim=-1)
        return k.unflatten(-1, (KV_HEADS, DIM)), v.unflatten(-1, (KV_HEADS, DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, enable_gqa=True)


class SideBySideAttention(FusedAttention):
    """Megatron's order: each head's key, then its value."""

    def grown(self, cache: Any, kv: Tensor) -> Tensor:
        kv = kv.unflatten(-1, (KV_HEADS, 2 * DIM))
        return kv if cache is None else torch.cat([cache, kv], dim=1)

    def taken_apart(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return kv[..., :DIM], kv[..., DIM:]


class Fused(Tupled):
    """Positions are learned, so that keys need no turning."""

    attention = FusedAttention

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(128, WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.embed = nn.Identity()

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        past = 0 if cache is None else cache[0].shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(past, past + ids.shape[1]))
        return super().forward(x, cache)


class SideBySide(Fused):
    attention = SideBySideAttention
