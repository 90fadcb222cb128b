"""Codes of a few bits, several in a byte: in runs of 8, 4, 2 and 1 bits; 3 bits are a run of 2 and one of 1. Nothing is
written in place: exported programs take these functions apart.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Some bits of all codes, packed by themselves."""

    bits: int
    shift: int
    """Of its lowest bit in the code."""

    def size(self, width: int) -> int:
        """Bytes that hold this part of `width` codes."""
        return -(-width * self.bits // 8)


class Plane(NamedTuple):
    """Part of the codes of neighbouring entries."""

    codes: Tensor
    """float32 [.., n]"""
    first: int
    """Which entry the first of them is of."""
    factor: int
    """What they count in the code."""


def runs(bits: int) -> list[Run]:
    """The highest bits last."""
    found, shift = list[Run](), 0
    for own in (8, 4, 2, 1):
        if bits & own:
            found.append(Run(own, shift))
            shift += own
    return found


def packed_size(width: int, bits: int) -> int:
    """Bytes that hold `width` codes."""
    return sum(run.size(width) for run in runs(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [.., width], each below 2**bits, bits up to 8 -> uint8 [.., bytes]. In each run of n bytes byte j holds the
    codes j, j + n, .. from its lowest bits on, so that unpacking reads and writes neighbours.
    """
    parts = runs(bits)
    if len(parts) == 1:
        return _packed(codes, parts[0])
    packed = [_packed((codes >> run.shift) & (2**run.bits - 1), run) for run in parts]
    return torch.cat(packed, -1)


def _packed(part: Tensor, run: Run) -> Tensor:
    if run.bits == 8:
        return part
    size, each = run.size(part.shape[-1]), 8 // run.bits
    planes = torch.nn.functional.pad(part, (0, size * each - part.shape[-1])).unflatten(-1, (each, size))
    out: Tensor = planes[..., 0, :]
    for at in range(1, each):
        out = out | (planes[..., at, :] << (at * run.bits))
    return out


def planes(held: Tensor, bits: int, width: int) -> list[Plane]:
    """What packed codes are, run by run; the last planes of a run may go beyond `width`."""
    found, begin = list[Plane](), 0
    for run in runs(bits):
        size = run.size(width)
        part = held[..., begin : begin + size]
        for at in range(0, 8, run.bits):
            shifted = part >> at if at else part
            codes = shifted & (2**run.bits - 1) if run.bits < 8 else shifted
            found.append(Plane(codes.float(), at // run.bits * size, 2**run.shift))
        begin += size
    return found


def unpack(held: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack`, as float32 [.., width]."""
    whole: Tensor | None = None
    for factor, run in groupby(planes(held, bits, width), lambda plane: plane.factor):
        part = torch.cat([plane.codes for plane in run], -1)[..., :width]
        whole = part * factor if whole is None else torch.add(whole, part, alpha=factor)
    assert whole is not None
    return whole


def entries(found: list[Plane]) -> int:
    """How many entries planes speak of, those beyond the width too."""
    return max(plane.first + plane.codes.shape[-1] for plane in found)
