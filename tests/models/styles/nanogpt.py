"""nanoGPT with a cache: fused projection, learned positions, a tuple of pairs, is_causal in the first call only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.styles.style import HEADS, LAYERS, VOCABULARY, WIDTH, Attention, Style
from torch import Tensor, nn


class CausalSelfAttention(Attention):
    def __init__(self, index: int) -> None:
        super().__init__(index, HEADS)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        if past is not None:
            k = torch.cat((past[0], k), dim=-2)
            v = torch.cat((past[1], v), dim=-2)
        y = self.attend(q, k, v, past is None)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=extra)


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention(index)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        y, present = self.attn(self.ln_1(x), past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class GPT(Style):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.h = nn.ModuleList(Block(i) for i in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        length = 0 if past is None else past[0][0].size(2)
        pos = torch.arange(length, length + idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        presents = []
        for i, block in enumerate(self.h):
            x, present = block(x, None if past is None else past[i])
            presents.append(present)
        return self.lm_head(self.ln_f(x)), presents

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache)  # type: ignore[no-any-return]
