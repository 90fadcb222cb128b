"""Decoders in plain PyTorch, no transformers: the ways in which people write a KV cache by hand.

Each is called `model(ids, cache) -> (logits, cache)` or keeps its cache in attributes and is called `model(ids)`.
Positions enter through rotary embeddings.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 61
Cache = tuple[tuple[Tensor, Tensor], ...]


def rotary(x: Tensor, start: int) -> Tensor:
    """Rotate [B, H, S, D] by positions start, start + 1, ..."""
    d = x.shape[-1] // 2
    angle = torch.outer(torch.arange(start, start + x.shape[2]), 100.0 ** (-torch.arange(d) / d))
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def causal_mask(queries: int, past: int) -> Tensor:
    """[S, T] bool: query i sits at position past + i."""
    return torch.ones(queries, past + queries, dtype=torch.bool).tril(past)


class Block(nn.Module):
    """Attention and a feed-forward layer. Subclasses say how heads are shared and how the mask is given."""

    rotates = True

    def __init__(self, index: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> None:
        super().__init__()
        width = heads * head_dim
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def project(self, x: Tensor, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and plain v of the new tokens, [B, H, S, D]."""
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        return (rotary(q, past), rotary(k, past), v) if self.rotates else (q, k, v)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the last q.shape[2] tokens over all, [B, H, *, D]. The oracle replaces this."""
        raise NotImplementedError

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.ff(x)


class TupleBlock(Block):
    """Cache in and out as a tuple, grown by torch.cat along dim 2; heads shared with repeat_interleave; explicit
    mask."""

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        past = 0 if cache is None else cache[0].shape[2]
        q, k, v = self.project(x, past)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        return self.finish(x, self.core(q, k, v)), (k, v)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = self.heads // self.kv_heads
        mask = causal_mask(q.shape[2], k.shape[2] - q.shape[2])
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class GroupedBlock(TupleBlock):
    """As above with enable_gqa; is_causal and no mask in prefill, no mask at all in decode."""

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


class AttributeBlock(Block):
    """[B, T, H, D] in module attributes: the first call stores its own k and v, later calls rebind to a cat along
    dim 1."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.ck: Tensor | None = None
        self.cv: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        past = 0 if self.ck is None else self.ck.shape[1]
        q, k, v = self.project(x, past)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.ck is not None and self.cv is not None:
            k, v = torch.cat([self.ck, k], dim=1), torch.cat([self.cv, v], dim=1)
        self.ck, self.cv = k, v
        return self.finish(x, self.core(q, k.transpose(1, 2), v.transpose(1, 2)))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal_mask(q.shape[2], k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Decoder(nn.Module):
    """Embedding, blocks, logits. The weights are large, so that attention is far from uniform."""

    block: type[Block] = TupleBlock

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block(i) for i in range(layers))
        width = self.blocks[0].q.in_features
        self.embed = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for block in self.blocks:
            nn.init.normal_(block.q.weight, std=0.4)
            nn.init.normal_(block.k.weight, std=0.4)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        x, grown = self.embed(ids), []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[i])
            grown.append(pair)
        return self.head(x), tuple(grown)


class GroupedDecoder(Decoder):
    block = GroupedBlock


class OneHeadBlock(TupleBlock):
    """One head that sees tokens, not positions."""

    rotates = False

    def __init__(self, index: int) -> None:
        super().__init__(index, heads=1, kv_heads=1, head_dim=32)


class ScriptedDecoder(Decoder):
    """One layer whose attention logits between two tokens are given: `logits[query token, key token]`, 32 by 32."""

    block = OneHeadBlock

    def __init__(self, logits: Tensor) -> None:
        super().__init__(layers=1)
        first = self.blocks[0]
        with torch.no_grad():
            self.embed.weight.zero_()[:32] = torch.eye(32)
            first.k.weight.copy_(torch.eye(32))
            first.q.weight.copy_(logits.T * 32**0.5)


class AttributeDecoder(Decoder):
    block = AttributeBlock

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @property
    def cache(self) -> list[tuple[Tensor | None, Tensor | None]]:
        return [(block.ck, block.cv) for block in self.blocks]


class Uncached(nn.Module):
    """No cache at all: reads everything at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner.embed(ids)
        for block in self.inner.blocks:
            x, _ = block(x, None)
        return self.inner.head(x)


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return kind().eval()


@functools.cache
def one(kind: type[nn.Module]) -> nn.Module:
    """The same object each time, for tests that share traces (`one_trace`)."""
    return make(kind)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
