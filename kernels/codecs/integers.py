"""Whole numbers times a scale: from the lowest entry of a group on, or around 0.

Asymmetric codes are round-to-nearest between a group's lowest and highest entry, as KIVI's values (arXiv 2402.02750)
and transformers' quantised caches have them; symmetric ones as vLLM's int8 caches. Lowest values and scales are float16
here, and codes are nearest to what those say, so that their rounding costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.code_products import mixed, products
from kvpass.kernels.codecs.codec import LARGEST, SCALE, Codec, Part, grouped, groups_of, half, ungrouped
from kvpass.kernels.codecs.one_scale import OneScale
from kvpass.kernels.codecs.packing import pack, packed_size, unpack
from torch import Tensor


class Asymmetric(Codec):
    """code = round((x - low) / scale), scale = (high - low) / (2**bits - 1); a constant group is its lowest entry."""

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits = name, bits

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        groups = groups_of(width, group)
        codes = Part("codes", packed_size(width, self.bits), torch.uint8)
        return codes, Part("scale", groups, SCALE), Part("low", groups, SCALE)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        parted = grouped(x.float().clamp(-LARGEST, LARGEST), group)
        lowest, highest = parted.aminmax(dim=-1)
        most = 2**self.bits - 1
        low, scale = half(lowest), half((highest - lowest) / most)
        step = scale.float()[..., None]
        steps = (parted - low.float()[..., None]) / torch.where(step > 0, step, 1.0)
        codes = ungrouped(steps.round().clamp(0, most), x.shape[-1]).to(torch.uint8)
        return pack(codes, self.bits), scale, low

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale, low = parts
        parted = grouped(unpack(codes, self.bits, width), group)
        return ungrouped(torch.addcmul(low.float()[..., None], parted, scale.float()[..., None]), width)

    def products(self, queries: Tensor, parts: Sequence[Tensor], group: int) -> Tensor:
        codes, scale, low = parts
        return products(queries, codes, self.bits, scale, low, group)

    def mixed(self, weights: Tensor, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale, low = parts
        return mixed(weights, codes, self.bits, scale, low, width, group)


class Symmetric(OneScale):
    """code = round(x / scale), scale = max |x| / (2**(bits - 1) - 1): zero is held exactly."""

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        parted, most = grouped(x.float().clamp(-LARGEST, LARGEST), group), 2 ** (self.bits - 1) - 1
        scale = half(parted.abs().amax(-1) / most)
        step = scale.float()[..., None]
        steps = (parted / torch.where(step > 0, step, 1.0)).round().clamp(-most, most)
        codes = ungrouped(steps + most, x.shape[-1]).to(torch.uint8)
        return pack(codes, self.bits), scale

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale = parts
        parted = grouped(unpack(codes, self.bits, width) - (2 ** (self.bits - 1) - 1), group)
        return ungrouped(parted * scale.float()[..., None], width)

    def products(self, queries: Tensor, parts: Sequence[Tensor], group: int) -> Tensor:
        codes, scale = parts
        return products(queries, codes, self.bits, scale, self._low(scale), group)

    def mixed(self, weights: Tensor, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale = parts
        return mixed(weights, codes, self.bits, scale, self._low(scale), width, group)

    def _low(self, scale: Tensor) -> Tensor:
        """What code 0 stands for."""
        low: Tensor = scale.float() * -(2 ** (self.bits - 1) - 1)
        return low
