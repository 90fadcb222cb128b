"""Llama's reference code: caches [B, Tmax, H, D] as plain attributes, written and read by slices of `start_pos`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from models.styles.gpt_fast import apply_rotary_emb, precompute_freqs_cis
from models.styles.style import DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, WIDTH, Projected, Style
from torch import Tensor, nn


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    bs, slen, n_kv_heads, head_dim = x.shape
    if n_rep == 1:
        return x
    return (
        x[:, :, :, None, :]
        .expand(bs, slen, n_kv_heads, n_rep, head_dim)
        .reshape(bs, slen, n_kv_heads * n_rep, head_dim)
    )


class ReferenceAttention(Projected):
    tokens_first = True

    def setup(self, batch: int, room: int) -> None:
        self.cache_k = torch.zeros((batch, room, KV_HEADS, DIM))
        self.cache_v = torch.zeros((batch, room, KV_HEADS, DIM))

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.new(x)
        xq, xk = apply_rotary_emb(xq, freqs_cis), apply_rotary_emb(xk, freqs_cis)
        self.match_device(xq)
        self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
        self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
        keys = self.cache_k[:bsz, : start_pos + seqlen]
        values = self.cache_v[:bsz, : start_pos + seqlen]
        output = self.attend(xq, keys, values, mask)
        return self.wo(output.contiguous().view(bsz, seqlen, -1))

    def match_device(self, like: Tensor) -> None:
        pass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        keys, values = repeat_kv(k, HEADS // KV_HEADS), repeat_kv(v, HEADS // KV_HEADS)
        xq, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(DIM)
        if extra is not None:
            scores = scores + extra
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return torch.matmul(scores, values).transpose(1, 2)


class MovingAttention(ReferenceAttention):
    """As in the original: every call moves the caches to where the queries are."""

    def match_device(self, like: Tensor) -> None:
        self.cache_k = self.cache_k.to(like)
        self.cache_v = self.cache_v.to(like)


class Llama(Style):
    attention: type[ReferenceAttention] = ReferenceAttention

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self.attention(i) for i in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def init_cache(self, batch: int, room: int) -> Any:
        for layer in self.layers:
            layer.setup(batch, room)
        self.freqs_cis = precompute_freqs_cis(room)
        return self

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        seqlen = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = h + layer(self.norm(h), start_pos, freqs_cis, mask)
        return self.output(h).float()

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, start), self


class MovingLlama(Llama):
    attention = MovingAttention
