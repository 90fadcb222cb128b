"""How keys and values lie in what is cached: new ones [B, S, H, D] into it, and out of it what the attention reads."""

from __future__ import annotations

import torch
from torch import Tensor

Cells = tuple[Tensor, ...]
"""What is cached of one layer: keys and values, or one tensor with both."""
AXES = {"bhtd": -2, "bthd": -3, "flat": -2, "btd": -2}
"""The token axis."""
HEADS_AXES = {"bhtd": 1, "bthd": 2, "flat": 2}


def laid_out(layout: str, x: Tensor) -> Tensor:
    """[B, S, H, D] as it is cached."""
    if layout == "bhtd":
        return x.transpose(1, 2)
    return x if layout == "bthd" else x.flatten(2)


def joined(parts: str, layout: str, k: Tensor, v: Tensor) -> Cells:
    """One call's keys and values, or one tensor with both."""
    if parts in ("stacked", "unbound"):
        return (torch.stack([k, v]),)
    if parts == "stacked_inner":
        return (torch.stack([k, v], dim=1),)
    if parts == "heads":
        return (torch.cat([k, v], dim=HEADS_AXES[layout]),)
    if parts in ("entries", "packed"):
        return (torch.cat([k, v], dim=-1),)
    return k, v


def taken_apart(parts: str, layout: str, cells: Cells) -> tuple[Tensor, Tensor]:
    if parts in ("stacked", "unbound"):
        return cells[0][0], cells[0][1]
    if parts == "stacked_inner":
        return cells[0].unbind(1)
    if parts == "heads":
        return cells[0].chunk(2, dim=HEADS_AXES[layout])
    if parts == "entries":
        half = cells[0].shape[-1] // 2
        return cells[0][..., :half], cells[0][..., half:]
    if parts == "packed":
        return cells[0].chunk(2, dim=-1)
    return cells[0], cells[1]


def with_heads(layout: str, x: Tensor, dim: int) -> Tensor:
    """Keys or values as the attention gets them: [B, H, T, D], [B, T, H, D], or [B, T, D] of one head."""
    return x.view(x.shape[0], x.shape[1], -1, dim) if layout == "flat" else x


def room_shape(parts: str, layout: str, batch: int, heads: int, room: int, dim: int) -> tuple[int, ...]:
    """Of a cell with room for so many tokens."""
    if parts == "heads":
        heads *= 2
    if parts in ("entries", "packed"):
        dim *= 2
    shape = {
        "bhtd": (batch, heads, room, dim),
        "bthd": (batch, room, heads, dim),
        "flat": (batch, room, heads * dim),
        "btd": (batch, room, dim),
    }[layout]
    if parts in ("stacked", "unbound"):
        return (2, *shape)
    return (shape[0], 2, *shape[1:]) if parts == "stacked_inner" else shape
