"""Feeding one conversation to a causal LM as generate() would: a left-padded prompt, then token by token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from oracle.anyhf import numbered
from overrides import TWO_CACHES, WHOLE_INPUT
from spelling import cache_of, declared, with_cache
from transformers import DynamicCache
from transformers.cache_utils import Cache, EncoderDecoderCache

LENGTHS = [90, 64]
STEPS = 8


class NoCache(RuntimeError):
    """The model runs, but not with a KV cache: out of scope, with the reason."""


def prompt(padded: bool = True, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a batch of two and its mask; the second row is padded on the left, with `filler`."""
    lengths = LENGTHS if padded else [max(LENGTHS)] * len(LENGTHS)
    width = max(lengths)
    ids = torch.randint(5, 90, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return torch.where(mask == 1, ids, filler), mask


def new_cache(model: Any) -> Cache | None:
    """The cache that generate() would pass, None where the model makes its own."""
    if not model._supports_default_dynamic_cache():
        return None
    text = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or model.config.model_type in TWO_CACHES:
        return EncoderDecoderCache(DynamicCache(config=text), DynamicCache(config=text))
    return DynamicCache(config=text)


def kv_layers(cache: Any) -> dict[int, Any]:
    """The layers of a cache that hold keys, by number."""
    found = {}
    for offset, part in numbered(cache):
        for i, layer in enumerate(getattr(part, "layers", [])):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, torch.Tensor) and keys.numel():
                found[offset + i] = layer
    return found


def full_layers(cache: Any) -> list[int]:
    """The layers that keep every token."""
    return [i for i, layer in kv_layers(cache).items() if not getattr(layer, "is_sliding", False)]


class Feed:
    """One conversation with one model, or with whatever `call` makes of its keyword arguments."""

    def __init__(self, model: Any, call: Any = None) -> None:
        self.takes = set(inspect.signature(type(model).forward).parameters)
        if declared(model) is None:
            raise NoCache("its forward takes no cache")
        self.model, self.call = model, call or model
        self.whole = model.config.model_type in WHOLE_INPUT
        self.ids: torch.Tensor | None = None
        self.cache: Any = new_cache(model)
        self.mask: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One forward pass; `mask` marks the padding of these tokens. Returns the logits of the last one."""
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        if self.whole:
            ids = self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        with torch.no_grad():
            out = self.call(**self.inputs(ids))
        self.cache = cache_of(out) or self.cache
        return out.logits[:, -1]

    def inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of a call, those that the model takes."""
        assert self.mask is not None
        positions = (self.mask.cumsum(-1) - 1).masked_fill(self.mask == 0, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, "use_cache": True}
        given = {name: value for name, value in given.items() if name in self.takes}
        if self.cache is not None:
            given |= with_cache(self.model, self.cache)
        return given

    def greedy(self, ids: torch.Tensor, mask: torch.Tensor, steps: int = STEPS) -> list[torch.Tensor]:
        """Logits of the prefill and of `steps` greedy calls after it."""
        logits = [self(ids, mask)]
        for _ in range(steps):
            logits.append(self(logits[-1].argmax(-1, keepdim=True)))
        return logits
