"""The Fourier transform of real numbers as a rotation: real parts of the lower half of the frequencies, then their
imaginary parts, each scaled so that lengths stay. What a transform of real numbers says twice is there once.
"""

from __future__ import annotations

import math

import torch
from kvpass.kernels.codecs.constants import constant
from torch import Tensor


def real_fourier(size: int, like: Tensor) -> Tensor:
    """float32 [size, size] on the device of `like`, its columns orthonormal: x @ it are the frequencies of x."""
    return constant(_made, size, like)


def _made(size: int, device: torch.device) -> Tensor:
    place = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    cosines = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)[:size]
    sines = torch.arange(1, max((size + 1) // 2, 1), dtype=torch.float64, device=device)
    turn = 2 * math.pi / max(size, 1) * place
    found = torch.cat([(turn * cosines).cos(), (turn * sines).sin()], 1)
    return (found / found.square().sum(0).sqrt()).float()
