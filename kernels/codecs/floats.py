"""Floating point numbers in torch's own formats: of sixteen bits, or of eight times a scale.

Eight bits as transformers' fp8 caches (one scale for all there, frozen after the first call), but with a scale for each
token and group, and saturating: torch's cast to e4m3fn is NaN above its largest number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.codec import LARGEST, SCALE, Codec, Part, grouped, groups_of, half, ungrouped
from torch import Tensor

LARGEST_CODE = 448.0
"""e4m3's largest number. e5m2 goes on to 57344, by which scales of common entries would be too small for float16: with
entries up to 0.005 a third of the largest was lost, below 0.001 everything.
"""


class Float16(Codec):
    """float16, at most its largest number: what most models have anyhow, half of float32's bytes."""

    name = "float16"

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        return (Part("codes", width, torch.float16),)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        return (half(x.float()),)

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        return parts[0].float()


class Float8(Codec):
    """code = x / scale in an 8-bit format, scale = max |x| / 448; held as bytes."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        return Part("codes", width, torch.uint8), Part("scale", groups_of(width, group), SCALE)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        parted = grouped(x.float().clamp(-LARGEST, LARGEST), group)
        scale = half(parted.abs().amax(-1) / LARGEST_CODE)
        step = scale.float()[..., None]
        codes = (parted / torch.where(step > 0, step, 1.0)).clamp(-LARGEST_CODE, LARGEST_CODE)
        return ungrouped(codes, x.shape[-1]).contiguous().to(self.dtype).view(torch.uint8), scale

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale = parts
        parted = grouped(codes.contiguous().view(self.dtype).float(), group)
        return ungrouped(parted * scale.float()[..., None], width)
