"""nanoVLM: a list of dicts; causal if all that is attended to is this call's, and more than one token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.plain import rotary
from models.styles.style import HEADS, KV_HEADS, LAYERS, Projected, Tupled
from torch import Tensor


class VisionAttention(Projected):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        start, block_kv_cache = cache
        q, k, v = (t.transpose(1, 2) for t in self.new(x))
        q, k = rotary(q, start), rotary(k, start)
        is_prefill = block_kv_cache is None
        if not is_prefill:
            k = torch.cat([block_kv_cache["key"], k], dim=2)
            v = torch.cat([block_kv_cache["value"], v], dim=2)
        y = self.attend(q, k, v, None)
        return self.wo(y.transpose(1, 2).contiguous().flatten(2)), {"key": k, "value": v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        t_curr, t_kv = q.size(2), k.size(2)
        causal = t_curr == t_kv and t_curr > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=causal)


class Vision(Tupled):
    attention = VisionAttention

    def forward(self, ids: Tensor, cache: Any, start_pos: int) -> tuple[Tensor, Any]:
        cache = [None] * LAYERS if cache is None else cache
        logits, grown = super().forward(ids, [(start_pos, layer) for layer in cache])
        return logits, list(grown)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache, start)
