"""Matrices that follow from a size: made once for each device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[int, torch.device], Tensor]
_MADE: dict[tuple[Make, int, torch.device], Tensor] = {}


def constant(make: Make, size: int, like: Tensor) -> Tensor:
    """`make(size, device)` on the device of `like`. Kept, but for tracers: theirs is part of the graph."""
    key, real = (make, size, like.device), type(like) is Tensor
    found = _MADE.get(key) if real else None
    if found is None:
        with torch.inference_mode(False):
            found = make(size, like.device)
        if real and type(found) is Tensor:  # a fake one has no contents
            _MADE[key] = found
    return found
