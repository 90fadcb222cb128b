"""x-transformers: each call returns a dataclass of intermediates; what is kept is a slice that leaves nothing out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models.plain import rotary
from models.styles.style import HEADS, KV_HEADS, Projected, Tupled
from torch import Tensor


@dataclass
class Intermediates:
    cached_kv: tuple[Tensor, Tensor]
    values: Tensor


@dataclass
class LayerIntermediates:
    attn_intermediates: list[Intermediates]
    cache_length: int = 0


class MemoryAttention(Projected):
    mem_len = 0

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Intermediates]:
        past = 0 if cache is None else cache.cached_kv[0].shape[-2]
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k, values = rotary(q, past), rotary(k, past), v
        if cache is not None:
            ck, cv = cache.cached_kv
            k, v = torch.cat((ck, k), dim=-2), torch.cat((cv, v), dim=-2)
        kept = k[..., self.mem_len :, :], v[..., self.mem_len :, :]
        i, j = q.shape[-2], k.shape[-2]
        hidden = torch.ones((i, j), device=q.device, dtype=torch.bool).triu(j - i + 1)
        y = self.attend(q, k, v, hidden)
        return self.wo(y.transpose(1, 2).flatten(2)), Intermediates(kept, values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        sim = sim.masked_fill(extra, -torch.finfo(sim.dtype).max)
        attn = F.softmax(sim, dim=-1, dtype=torch.float32)
        return torch.einsum("b h i j, b h j d -> b h i d", attn, v)


class Intermediate(Tupled):
    attention = MemoryAttention

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, LayerIntermediates]:
        layers = None if cache is None else cache.attn_intermediates
        logits, found = super().forward(ids, layers)
        return logits, LayerIntermediates(list(found), ids.shape[1])
