"""What callers make of transformers' caches and of a model's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Counting(DynamicCache):
    """Counts its updates."""

    updates = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.updates += 1
        return super().update(*args, **kwargs)


class OwnLayer(DynamicLayer):
    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def own_layers(config: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [OwnLayer() for _ in range(config.num_hidden_layers)]
    return cache


class Halved(DynamicCache):
    """Values in half precision, keys not."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states.bfloat16(), *args, **kwargs)
        return keys, values.float()


class Looking(DynamicCache):
    """Reads its keys."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(*args, **kwargs)
        self.norms = keys.norm(dim=-1)
        return keys, values


class Cast(torch.nn.Module):
    """A part that runs under autocast, or else gives another dtype."""

    def __init__(self, inner: torch.nn.Module, automatic: bool) -> None:
        super().__init__()
        self.inner, self.automatic = inner, automatic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.automatic:
            return self.inner(*args, **kwargs).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(*args, **kwargs)


def cast(part: str, automatic: bool = True) -> Callable[[], Any]:
    """Makes a Llama of which a part (by its path in the layer) is cast."""

    def made() -> Any:
        model = tiny.llama(layers=1)
        at, _, name = part.rpartition(".")
        parent = model.model.layers[0].get_submodule(at)
        setattr(parent, name, Cast(getattr(parent, name), automatic))
        return model

    return made


def checkpointing() -> Any:
    model = tiny.llama(layers=1)
    model.gradient_checkpointing_enable()
    return model
