"""Codes by signs, times the mean |x| of a group: three levels (1.58 bits), or two behind a half of two bits.

As VidKV (arXiv 2503.16257; KD-TAO/VidKV, vidkv_quant.py), whose groups are 32 tokens of one channel where these are
neighbouring entries of one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs.codec import LARGEST, SCALE, Codec, Part, grouped, groups_of, half, ungrouped
from kvpass.kernels.codecs.fits import first_part
from kvpass.kernels.codecs.integers import Asymmetric
from kvpass.kernels.codecs.packing import pack, packed_size
from torch import Tensor

EACH = 5
"""Codes of three levels in a byte."""


class Ternary(Codec):
    """-1, 0 or 1 times a scale: 0 where |x| is at most half of it. Byte j of n holds the codes j, j + n, .., the first
    one counting 1, the next 3, and so on.
    """

    name = "ternary"

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        codes = Part("codes", -(-width // EACH), torch.uint8)
        return codes, Part("scale", groups_of(width, group), SCALE)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        x = x.float().clamp(-LARGEST, LARGEST)
        scale, parted = mean_size(x, group), grouped(x, group)
        least = scale.float()[..., None] / 2
        codes = ungrouped((parted > least).int() - (parted < -least).int() + 1, x.shape[-1])
        size = -(-x.shape[-1] // EACH)
        planes = torch.nn.functional.pad(codes, (0, size * EACH - x.shape[-1])).unflatten(-1, (EACH, size))
        return sum(planes[..., at, :] * 3**at for at in range(EACH)).to(torch.uint8), scale

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        codes, scale = parts
        digits = torch.cat([codes // 3**at % 3 for at in range(EACH)], -1)[..., :width].float() - 1
        return ungrouped(grouped(digits, group) * scale.float()[..., None], width)


class TwoAndOne(Codec):
    """Two bits for the first half of the entries, between the lowest and the highest of a group; the signs of the
    others, times a scale. Bytes, scales and lowest numbers of the first half stand before those of the other.
    """

    name = "mixed_2_1"
    two, one = Asymmetric("", 2), Asymmetric("", 1)

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        first, rest = first_part(width), width - first_part(width)
        groups = groups_of(first, group) + groups_of(rest, group)
        codes = Part("codes", packed_size(first, 2) + packed_size(rest, 1), torch.uint8)
        return codes, Part("scale", groups, SCALE), Part("low", groups, SCALE)

    def encode(self, x: Tensor, group: int) -> tuple[Tensor, ...]:
        first = first_part(x.shape[-1])
        found = self.two.encode(x[..., :first], group)
        if first == x.shape[-1]:
            return found
        rest = x[..., first:].float().clamp(-LARGEST, LARGEST)
        size = mean_size(rest, group)
        signs = pack((rest >= 0).to(torch.uint8), 1)
        return tuple(torch.cat(both, -1) for both in zip(found, (signs, half(2 * size.float()), -size), strict=True))

    def decode(self, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        first = first_part(width)
        two, one = self._split(parts, width, group)
        both = [self.two.decode(two, first, group), self.one.decode(one, width - first, group) if one else None]
        return torch.cat([x for x in both if x is not None], -1)

    def products(self, queries: Tensor, parts: Sequence[Tensor], group: int) -> Tensor:
        width = queries.shape[-1]
        first, (two, one) = first_part(width), self._split(parts, width, group)
        found = self.two.products(queries[..., :first], two, group)
        return found + self.one.products(queries[..., first:], one, group) if one else found

    def mixed(self, weights: Tensor, parts: Sequence[Tensor], width: int, group: int) -> Tensor:
        first, (two, one) = first_part(width), self._split(parts, width, group)
        found = self.two.mixed(weights, two, first, group)
        return torch.cat([found, self.one.mixed(weights, one, width - first, group)], -1) if one else found

    def _split(self, parts: Sequence[Tensor], width: int, group: int) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of the two bits, and of the signs; none if there are no signs."""
        first = first_part(width)
        sizes = packed_size(first, 2), groups_of(first, group), groups_of(first, group)
        two = [part[..., :size] for part, size in zip(parts, sizes, strict=True)]
        one = [part[..., size:] for part, size in zip(parts, sizes, strict=True)]
        return two, one if first < width else []


def mean_size(x: Tensor, group: int) -> Tensor:
    """float16 [.., groups]: the mean |x| of each group of x, float32 [.., width], summed in float64."""
    width = x.shape[-1]
    group = min(group, width)
    padded = torch.nn.functional.pad(x.double().abs(), (0, -width % group)).unflatten(-1, (-1, group))
    begins = torch.arange(padded.shape[-2], device=x.device) * group
    return half((padded.sum(-1) / (width - begins).clamp(max=group)).float())
