"""Caches that kvpass saw and left dense: nothing in them is a shell, so their tensors remember who saw them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from kvpass.runtime.identity import Origin
from kvpass.runtime.store import version

_LEFT = "_kvpass_left"
FEWEST_AXES = 3
"""Of a tensor that may be a cache."""


class Marking:
    """Runs a graph, and marks the inputs that it wrote to: these hold data. A deep copy of a tensor keeps the mark."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.inputs: list[int] | None = None

    def run(self, inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        """One call."""
        if self.inputs is None:
            self.inputs = [at for at, value in enumerate(args) if _may_be_cache(value)]
        given = [args[at] for at in self.inputs]
        before = [version(tensor) for tensor in given]
        results = inner(*args)
        written = [t for t, seen in zip(given, before, strict=True) if seen is None or version(t) != seen]
        self._mark(written)
        return results

    def _mark(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            setattr(tensor, _LEFT, self.origin)


class Left(Marking):
    """Of a graph whose attentions all stay dense: what it returns may be a cache too."""

    def run(self, inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        results = super().run(inner, args)
        self._mark(filter(_may_be_cache, results))
        return results


def left_by(tensor: torch.Tensor) -> Origin | None:
    """Who saw this cache and left it as it is."""
    found: Origin | None = getattr(tensor, _LEFT, None)
    return found


def _may_be_cache(value: Any) -> bool:
    is_data = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return is_data and value.dim() >= FEWEST_AXES
