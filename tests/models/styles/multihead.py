"""nn.MultiheadAttention: its weights with a cache of one's own, and whole encoder layers that know no cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.styles.style import HEADS, LAYERS, VOCABULARY, WIDTH, Attention, Style, Tupled
from torch import Tensor, nn


class WrappedAttention(Attention):
    """The projections of an nn.MultiheadAttention; it does not attend itself, as it would project cached keys again."""

    def __init__(self, index: int) -> None:
        super().__init__(index, HEADS)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        q, k, v = F._in_projection_packed(x, x, x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        y = self.attend(q, k, v, cache is None)
        return self.mha.out_proj(y.transpose(1, 2).flatten(-2)), {"k": k, "v": v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=extra)


class Multihead(Tupled):
    attention = WrappedAttention


class Recomputing(Style):
    """nn.TransformerEncoder with a causal mask: no cache, the caller gives all tokens at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embed(ids), mask=mask, is_causal=True))

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        ids = ids if cache is None else torch.cat([cache, ids], dim=1)
        return self(ids), ids
