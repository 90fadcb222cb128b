"""Codecs of packed codes, with one scale a group and nothing else."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.codec import SCALE, Codec, Part, groups_of
from kvpass.kernels.codecs.packing import packed_size


class OneScale(Codec):
    """Of so many bits a code."""

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits = name, bits

    def parts(self, width: int, group: int) -> tuple[Part, ...]:
        codes = Part("codes", packed_size(width, self.bits), torch.uint8)
        return codes, Part("scale", groups_of(width, group), SCALE)
