"""gpt-fast: a KVCache module with buffers [B, H, Tmax, D] in each layer, written at `input_pos`; a mask looked up at
it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.styles.style import DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, WIDTH, Attention, Style
from torch import Tensor, nn


class KVCache(nn.Module):
    def __init__(self, batch: int, room: int) -> None:
        super().__init__()
        shape = (batch, KV_HEADS, room, DIM)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        assert input_pos.shape[0] == k_val.shape[2]
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class CopiedCache(KVCache):
    """The same with index_copy_."""

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache.index_copy_(2, input_pos, k_val)
        self.v_cache.index_copy_(2, input_pos, v_val)
        return self.k_cache, self.v_cache


class ScatteredCache(KVCache):
    """The same with scatter_."""

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        index = input_pos.view(1, 1, -1, 1).expand(k_val.shape)
        return self.k_cache.scatter_(2, index, k_val), self.v_cache.scatter_(2, index, v_val)


class SelfAttention(Attention):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv_cache: Any = None

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        kv_size = KV_HEADS * DIM
        q, k, v = self.wqkv(x).split([WIDTH, kv_size, kv_size], dim=-1)
        q = q.view(bsz, seqlen, HEADS, DIM)
        k = k.view(bsz, seqlen, KV_HEADS, DIM)
        v = v.view(bsz, seqlen, KV_HEADS, DIM)
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        y = self.attend(q, k, v, mask)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, WIDTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, dropout_p=0.0)


class FusedAttention(SelfAttention):
    """As newer versions: enable_gqa."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, dropout_p=0.0, enable_gqa=True)


class TransformerBlock(nn.Module):
    def __init__(self, index: int, attention: type[SelfAttention]) -> None:
        super().__init__()
        self.attention = attention(index)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, input_pos: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(Style):
    cache: type[KVCache] = KVCache
    attention: type[SelfAttention] = SelfAttention

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TransformerBlock(i, self.attention) for i in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def init_cache(self, batch: int, room: int) -> Any:
        for block in self.layers:
            block.attention.kv_cache = self.cache(batch, room)
        self.register_buffer("freqs_cis", precompute_freqs_cis(room), persistent=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(room, room, dtype=torch.bool)), persistent=False)
        return self

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        freqs_cis = self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, input_pos, freqs_cis, mask)
        return self.output(self.norm(x))

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, torch.arange(start, start + ids.shape[1])), self


class CopiedTransformer(Transformer):
    cache = CopiedCache


class ScatteredTransformer(Transformer):
    cache = ScatteredCache


class FusedTransformer(Transformer):
    attention = FusedAttention


def precompute_freqs_cis(room: int) -> Tensor:
    freqs = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angle = torch.outer(torch.arange(room), freqs)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs_cis = freqs_cis.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * freqs_cis[..., 0] - pairs[..., 1] * freqs_cis[..., 1],
            pairs[..., 1] * freqs_cis[..., 0] + pairs[..., 0] * freqs_cis[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)
