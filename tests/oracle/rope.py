"""Queries and keys of a tiny llama before and after their rotation, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

DIM = 16
"""Of a head."""


def turn(model: Any, position: int) -> np.ndarray:
    """The rotation matrix of a position: q_embed = R q."""
    angle = position * model.model.rotary_emb.inv_freq.double().numpy()
    half = DIM // 2
    matrix = np.zeros((DIM, DIM))
    for f in range(half):
        c, s = np.cos(angle[f]), np.sin(angle[f])
        matrix[f, f] = matrix[f + half, f + half] = c
        matrix[f, f + half], matrix[f + half, f] = -s, s
    return matrix


def projected(weight: torch.Tensor, hidden: np.ndarray, heads: int) -> np.ndarray:
    """[T, size] -> [heads, T, D], not rotated."""
    return (hidden @ weight.detach().double().numpy().T).reshape(len(hidden), heads, DIM).transpose(1, 0, 2)


@contextmanager
def hidden_states(model: Any) -> Iterator[list[np.ndarray]]:
    """What the attention of each layer reads in the calls inside the block, float64 [B, T, size], layer by layer."""
    seen: list[np.ndarray] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda m, a, out: seen.append(out.detach().double().numpy()))
        for layer in model.model.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()
