"""What a call of `generate` is asked for and given, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvpass.runtime.shell import find

CACHES = ("cache", "past_key_values")
"""Names of the cache among arguments and outputs, newest first."""


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names that the function gives them; positional ones without a name are left out."""
    named = (p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    return {**dict(zip(named, args, strict=False)), **kwargs}


def parts_of(cache: Any) -> Iterator[Any]:
    """A cache, and those that it holds: of an encoder-decoder model one for each kind of attention."""
    if cache is not None:
        yield cache
        for name in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(cache, name):
                yield getattr(cache, name)


def cache_in(fields: Mapping[str, Any]) -> Any:
    """The cache among arguments or outputs; None if there is none."""
    return next((fields[name] for name in CACHES if fields.get(name) is not None), None)


def length_of(cache: Any) -> int:
    """Tokens in a cache, as its host counts them: what was cropped and not called since is not in it."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    while isinstance(cache, (tuple, list)) and cache:
        cache = cache[0]
    store = find(cache)
    return int(cache.shape[store.layouts[0].token_axis]) if store is not None else 0


def prompt_in(args: Sequence[Any], given: Mapping[str, Any]) -> torch.Tensor | None:
    """The tokens that `generate` was given, int [B, T]."""
    found = (*args[:1], given.get("inputs"), given.get("input_ids"))
    return next((ids for ids in found if is_tokens(ids)), None)


def is_tokens(value: Any) -> bool:
    """Whether it is int [B, T]."""
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()


class Asked:
    """One call's settings: what its keyword arguments leave out is taken from a generation config.

    Args:
        given: the call's keyword arguments.
    """

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.given, self.config = given, getattr(model, "config", None)
        self.configs = [c for c in (given.get("generation_config"), getattr(model, "generation_config", None)) if c]

    def __call__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return next((value for c in self.configs if (value := getattr(c, name, None)) is not None), None)
