"""Codes of a few bits, several in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(width: int, bits: int) -> int:
    """Bytes that hold `width` codes."""
    return -(-width * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [.., width], each below 2**bits, bits 2, 4 or 8 -> uint8 [.., bytes]: byte j holds the codes j, j + bytes,
    .. from its lowest bits on, so that unpacking reads and writes runs.
    """
    if bits == 8:
        return codes
    size = packed_size(codes.shape[-1], bits)
    missing = size * (8 // bits) - codes.shape[-1]
    planes = torch.nn.functional.pad(codes, (0, missing)).unflatten(-1, (8 // bits, size))
    out: Tensor = planes[..., 0, :].clone()
    for at in range(1, 8 // bits):
        out |= planes[..., at, :] << (at * bits)
    return out


def planes(held: Tensor, bits: int) -> list[Tensor]:
    """float32 [.., bytes] each: the codes of entries 0, 1, .., then of entries bytes, bytes + 1, .., and so on."""
    if bits == 8:
        return [held.float()]
    mask = 2**bits - 1
    return [((held >> at) & mask if at else held & mask).float() for at in range(0, 8, bits)]


def unpack(held: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack`, as float32 [.., width]."""
    found = planes(held, bits)
    return found[0] if bits == 8 else torch.cat(found, -1)[..., :width]
