"""The Fourier transform of real numbers as a rotation: real parts of the lower half of the frequencies, then their
imaginary parts, each scaled so that lengths stay. What a transform of real numbers says twice is there once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MADE: dict[tuple[int, torch.device], Tensor] = {}


def real_fourier(size: int, device: torch.device) -> Tensor:
    """float32 [size, size], its columns orthonormal: x @ it are the frequencies of x. Kept, unless it has no contents
    (fake tensors).
    """
    key = size, device
    found = _MADE.get(key)
    if found is None:
        with torch.inference_mode(False):
            place = torch.arange(size, dtype=torch.float64, device=device)[:, None]
            real = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)[:size]
            imaginary = torch.arange(1, max((size + 1) // 2, 1), dtype=torch.float64, device=device)
            turn = 2 * math.pi / max(size, 1) * place
            found = torch.cat([(turn * real).cos(), (turn * imaginary).sin()], 1)
            found = (found / found.square().sum(0).sqrt()).float()
        if type(found) is Tensor:
            _MADE[key] = found
    return found
