"""The cache by the name that transformers gives it: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")
"""Newest first."""

INSTALLED = next(name for name in NAMES if name in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)})
"""What the models of the installed transformers say."""


@functools.cache
def _declared(kind: type) -> str | None:
    parameters = inspect.signature(kind.forward).parameters if hasattr(kind, "forward") else {}
    return next((name for name in NAMES if name in parameters), None)


def declared(model: Any) -> str | None:
    """The name of the cache among the parameters of the model's forward; None if it has no such parameter."""
    return _declared(type(model))


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `cache` to the model, or to its generate. A wrapper that declares none hands on
    the name of the installed transformers."""
    return {declared(model) or INSTALLED: cache}


def given_cache(inputs: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a call; None without one."""
    return next((inputs[name] for name in NAMES if name in inputs), None)


def cache_of(out: Any) -> Any:
    """The cache in what a model or its generate returned; None without one."""
    return out.cache if hasattr(out, "cache") else getattr(out, "past_key_values", None)
