"""Decoders of 100 layers, small in all else: how long kvpass thinks about a graph depends on its nodes alone."""

from __future__ import annotations

from typing import Any

import torch
from spelling import cache_of, with_cache
from torch import Tensor, nn

LAYERS = 100
HEADS, KV_HEADS, DIM = 4, 2, 8
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """Grouped heads, a tuple cache grown by cat, attention written out, a mask made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * DIM), nn.Linear(WIDTH, KV_HEADS * DIM)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t.view(*x.shape[:2], -1, DIM).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        group, new, whole = HEADS // KV_HEADS, q.shape[2], k.shape[2]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / DIM**0.5
        future = torch.arange(whole) > torch.arange(whole - new, whole)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        y = weights @ v.repeat_interleave(group, 1)
        return x + self.o(y.transpose(1, 2).flatten(2)), (k, v)


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        grown = []
        for layer, past in zip(self.layers, cache, strict=True):
            x, pair = layer(x, past)
            grown.append(pair)
        return x, grown


def plain_decoder(layers: int = LAYERS) -> tuple[Any, dict[str, Any]]:
    """A decoder, and the arguments of a step."""
    shape = (1, KV_HEADS, 7, DIM)
    cache = [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]
    return Decoder(layers).eval(), {"x": torch.randn(1, 1, WIDTH), "cache": cache}


def llama(layers: int = LAYERS) -> tuple[Any, dict[str, Any]]:
    """transformers' Llama behind a padded prompt, and the arguments of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(1, 9)[None]
    cache = cache_of(model(ids))
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 0] = 0
    return model, {"input_ids": ids[:, :1], **with_cache(model, cache), "attention_mask": mask}


MODELS = {"plain decoder, attention written out": plain_decoder, "llama, SDPA, padded": llama}
