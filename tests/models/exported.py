"""Decode steps exported by torch.export: past K and V as inputs, grown K and V as outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from models import plain, tiny
from spelling import cache_of, with_cache
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache


class Step(nn.Module):
    """A plain decoder with its cache spread out: `(ids, k0, v0, k1, v1, ..) -> (logits, k0, v0, ..)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor) -> tuple[Tensor, ...]:
        logits, grown = self.model(ids, ((k0, v0), (k1, v1)))
        return logits, *(t for pair in grown for t in pair)


class HFStep(Step):
    """The same for a transformers model."""

    def forward(self, ids: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer, (k, v) in zip(cache.layers, ((k0, v0), (k1, v1)), strict=True):
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k, v
        out = self.model(ids, **with_cache(self.model, cache), use_cache=True)
        return out.logits, *(t for layer in cache_of(out).layers for t in (layer.keys, layer.values))


def export(
    step: nn.Module, head_dim: int, batch: int = 2, past: Any = Dim.DYNAMIC, rows: Any = None
) -> ExportedProgram:
    """One token after five. past, rows: whether these dimensions may change (None: no)."""
    caches = [torch.randn(batch, 2, 5, head_dim) for _ in range(4)]
    shapes = ({0: rows}, *({0: rows, 2: past} for _ in caches))
    with torch.no_grad():
        return torch.export.export(step, (torch.ones(batch, 1, dtype=torch.long), *caches), dynamic_shapes=shapes)


@functools.cache
def program(name: str, batch: int = 2) -> tuple[Any, ExportedProgram]:
    """(model, its exported step) of `plain`, `grouped` (no mask) or `llama`, two layers each."""
    if name == "llama":
        model = tiny.llama()
        return model, export(HFStep(model), 16, batch)
    model = plain.make(plain.Decoder if name == "plain" else plain.GroupedDecoder)
    return model, export(Step(model), 8, batch)
