"""Caches that kvpass saw and left dense: nothing in them is a shell, so their tensors remember who saw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpass.runtime.store import Origin

_LEFT = "_kvpass_left"
FEWEST_AXES = 3
"""Of a tensor that may be a cache."""


class Left:
    """Marks the tensors of a graph whose attentions all stay dense. A deep copy of a tensor keeps the mark."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.inputs: list[int] | None = None

    def mark(self, args: Sequence[Any], results: Any) -> None:
        """After a call: what it returned, and the buffers that it may have written to."""
        if self.inputs is None:
            self.inputs = [at for at, value in enumerate(args) if _may_be_cache(value)]
        for tensor in (*(args[at] for at in self.inputs), *filter(_may_be_cache, results)):
            setattr(tensor, _LEFT, self.origin)


def left_by(tensor: torch.Tensor) -> Origin | None:
    """Who saw this cache and left it as it is."""
    found: Origin | None = getattr(tensor, _LEFT, None)
    return found


def _may_be_cache(value: Any) -> bool:
    is_data = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return is_data and value.dim() >= FEWEST_AXES
