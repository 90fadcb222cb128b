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


def unpack(held: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack`, as float32 [.., width]."""
    if bits == 8:
        return held.float()
    size, mask = held.shape[-1], 2**bits - 1
    out = held.new_empty(*held.shape[:-1], size * (8 // bits), dtype=torch.float32)
    for at in range(8 // bits):
        out[..., at * size : (at + 1) * size] = (held >> (at * bits)) & mask
    return out[..., :width]
