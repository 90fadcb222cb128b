"""Hadamard rotation: outliers of single channels are spread over all of them before they are rounded.

Sylvester's matrix / sqrt(n), symmetric and its own inverse, without random signs, block by block along a head, as
llama.cpp rotates quantised caches (PR 21038). Queries are rotated alike, so that products stay what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MADE: dict[tuple[int, torch.device], Tensor] = {}


def block_of(width: int) -> int:
    """The largest power of two that divides a head's width; 1: nothing to rotate."""
    return width & -width


def rotated(x: Tensor) -> Tensor:
    """float32 [.., width], rotated; twice is x again."""
    size = block_of(x.shape[-1])
    if size < 2:
        return x
    blocks: Tensor = x.unflatten(-1, (-1, size))
    return (blocks @ _matrix(size, x)).flatten(-2)


def _matrix(size: int, like: Tensor) -> Tensor:
    """float32 [size, size] on the device of `like`; kept, but for tracers: theirs is part of the graph."""
    key, real = (size, like.device), type(like) is Tensor
    found = _MADE.get(key) if real else None
    if found is None:
        with torch.inference_mode(False):
            found = torch.ones(1, 1, device=like.device)
            while len(found) < size:
                found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
            found = found / size**0.5
        if real and type(found) is Tensor:
            _MADE[key] = found
    return found
