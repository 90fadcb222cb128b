"""Codes by the levels of a normal distribution, times what gives a group its norm back: TurboQuant as vLLM has it
(quantization/turboquant, with norm correction; arXiv 2504.19874).

Entries of a rotated vector are nearly normal, so the levels of least square error are known beforehand and a group
needs one scale and no lowest number. Levels alone would lose some of its norm: the scale is the norm divided by that
of the levels that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.codec import LARGEST, grouped, half, ungrouped
from kvpass.kernels.codecs.constants import constant
from kvpass.kernels.codecs.one_scale import OneScale
from kvpass.kernels.codecs.packing import pack, unpack
from torch import Tensor

POSITIVE = {
    2: (0.4526, 1.5096),
    3: (0.2450, 0.7556, 1.3432, 2.1504),
    4: (0.1284, 0.3881, 0.6569, 0.9424, 1.2563, 1.6179, 2.0684, 2.7309),
}
"""Levels of a standard normal distribution above 0 (Lloyd and Max), by bits; those below are the same."""


class Normal(OneScale):
    """code = how many midpoints between levels are at most x / n sqrt(g), n the norm of a group of g entries."""

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        width, own = x.shape[-1], min(group, x.shape[-1])
        padded = torch.nn.functional.pad(x.double().clamp(-LARGEST, LARGEST), (0, -width % own))
        parted = padded.unflatten(-1, (-1, own))
        entry = torch.arange(padded.shape[-1], device=x.device).view(parted.shape[-2:])
        real = entry < width
        norm = parted.square().sum(-1, keepdim=True).sqrt()
        unit = parted / torch.where(norm == 0, 1.0, norm) * real.sum(-1, keepdim=True).sqrt()
        table = constant(levels, self.bits, x).double()
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2, right=True)
        chosen = (table[codes].square() * real).sum(-1, keepdim=True).sqrt()
        scale = half((norm / chosen).float().squeeze(-1))
        return pack(ungrouped(codes, width).to(torch.uint8), self.bits), scale

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale = parts
        table = constant(levels, self.bits, codes)
        found = table[unpack(codes, self.bits, width).int()]
        return ungrouped(grouped(found, group) * scale.float()[..., None], width)


def levels(bits: int, device: torch.device) -> Tensor:
    """float32 [2**bits], rising."""
    above = POSITIVE[bits]
    return torch.tensor([*(-x for x in reversed(above)), *above], device=device)
