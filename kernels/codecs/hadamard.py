"""Hadamard rotation: outliers of single channels are spread over all of them before they are rounded.

Sylvester's matrix / sqrt(n), symmetric and its own inverse, without random signs, block by block along a head, as
llama.cpp rotates quantised caches (PR 21038). Queries are rotated alike, so that products stay what they were.
"""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.constants import constant
from torch import Tensor


def block_of(width: int) -> int:
    """The largest power of two that divides a head's width; 1: nothing to rotate."""
    return width & -width


def rotated(x: Tensor) -> Tensor:
    """float32 [.., width], rotated; twice is x again."""
    size = block_of(x.shape[-1])
    if size < 2:
        return x
    blocks: Tensor = x.unflatten(-1, (-1, size))
    return (blocks @ constant(_sylvester, size, x)).flatten(-2)


def _sylvester(size: int, device: torch.device) -> Tensor:
    """float32 [size, size]"""
    found: Tensor = torch.ones(1, 1, device=device)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    found = found / size**0.5
    return found
