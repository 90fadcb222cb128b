"""What the decoders of this folder share: one protocol for whoever runs them, and what their attention means.

A style is written as its authors write it. It gets tokens through `step`, wherever its cache lives, and each of its
attentions calls `self.attend(q, k, v, extra)`, which the oracle replaces: q, k, v in the style's own axes, k and v all
that the attention may read (a buffer with room for more, or the tokens so far), `extra` what else the style needs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LAYERS, HEADS, KV_HEADS, DIM = 61, 2, 4, 2, 8
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """Facts about a style's attention, for the oracle.

    Attributes:
        tokens_first: q, k, v are [B, T, H, D], not [B, H, T, D].
        scale: of q k^T, if q does not carry it.
        softcap: 0, or c of c * tanh(logits / c).
    """

    tokens_first = False
    scale = DIM**-0.5
    softcap = 0.0

    def __init__(self, index: int, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.index, self.kv_heads = index, kv_heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        raise NotImplementedError

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """[H, S, T] to add to the logits, from positions."""
        return None

    def sink_logits(self) -> Tensor | None:
        """[H], of a key without a value."""
        return None


class Projected(Attention):
    """Projections without bias, and the tensors of new tokens."""

    def __init__(self, index: int, kv_heads: int = KV_HEADS) -> None:
        super().__init__(index, kv_heads)
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, kv_heads * DIM, bias=False)
        self.wv = nn.Linear(WIDTH, kv_heads * DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def new(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, S, H, D]."""
        b, s, _ = x.shape
        return tuple(w(x).view(b, s, -1, DIM) for w in (self.wq, self.wk, self.wv))  # type: ignore[return-value]


class Style(nn.Module):
    """A decoder. Subclasses keep their cache where their authors would."""

    def init_cache(self, batch: int, room: int) -> Any:
        """An empty cache for sequences of at most `room` tokens; the module itself if it keeps the cache."""
        return None

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        """Logits of new tokens, the first of which is at position `start`, and the cache to go on with."""
        raise NotImplementedError

    def attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]


class Tupled(Style):
    """Embedding, blocks of attention and feed-forward, logits; the cache is a tuple of pairs."""

    attention: type[Attention]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attention_layers = nn.ModuleList(self.attention(i, **options) for i in range(LAYERS))
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        x, grown = self.embed(ids), []
        for i, (attention, feed) in enumerate(zip(self.attention_layers, self.feed_forward, strict=True)):
            y, layer = attention(x, None if cache is None else cache[i])
            grown.append(layer)
            x = x + y
            x = x + feed(x)
        return self.head(x), tuple(grown)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        return self(ids, cache)  # type: ignore[no-any-return]


def make(kind: Any) -> Any:
    """A style with weights so large that attention is far from uniform."""
    torch.manual_seed(4)
    model = kind().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and any(part in name for part in ("wq", "wk", "wqkv", "c_attn", "in_proj")):
            nn.init.normal_(weight, std=0.4)
    return model


@functools.cache
def one(kind: Any) -> Any:
    """The same object each time, for tests that share traces (`one_trace`)."""
    return make(kind)


def greedy(model: Any, prompt: Tensor, steps: int, room: int = 128) -> tuple[Tensor, list[Tensor], Any]:
    """Tokens that a style chooses, its logits call by call, and the cache at the end."""
    cache, ids, start = model.init_cache(len(prompt), room), prompt, 0
    tokens, logits = [], []
    for _ in range(steps + 1):
        with torch.no_grad():
            out, cache = model.step(ids, cache, start)
        start += ids.shape[1]
        logits.append(out[:, -1])
        ids = out[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids)
    return torch.cat(tokens, 1), logits, cache
