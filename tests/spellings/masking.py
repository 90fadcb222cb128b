"""Masks: True where a query may look, [S, T]; how they enter the logits."""

from __future__ import annotations

from typing import Any

import torch
from spellings.writing import index_of
from torch import Tensor

WINDOW = 8


def tril(square: Tensor, place: Any, count: int, length: int) -> Tensor:
    return torch.ones(count, length, dtype=torch.bool).tril(length - count)


def rows(square: Tensor, place: Any, count: int, length: int) -> Tensor:
    """Of the square that the model keeps."""
    return square[place : place + count] if isinstance(place, int) else square[index_of(place, count)]


def positions(square: Tensor, place: Any, count: int, length: int) -> Tensor:
    return torch.arange(length) <= index_of(place, count)[:, None]


def prompt(square: Tensor, place: Any, count: int, length: int) -> Tensor | None:
    """None for one token, which sees all."""
    return tril(square, place, count, length) if count > 1 else None


def within_window(mask: Tensor, place: Any, count: int) -> Tensor:
    return mask & (index_of(place, count)[:, None] - torch.arange(mask.shape[-1]) < WINDOW)


def distances(slopes: Tensor, place: Any, count: int, length: int) -> Tensor:
    """ALiBi, [H, S, T]."""
    return slopes[:, None, None] * (torch.arange(length) - index_of(place, count)[:, None])


MASKS = {"tril": tril, "rows": rows, "positions": positions, "prompt": prompt}


def as_float(mask: Tensor, bias: Tensor | None, applied: str, dtype: torch.dtype) -> Tensor:
    """To add to the logits."""
    hidden = float("-inf") if applied == "inf" else torch.finfo(dtype).min
    if bias is not None:
        return bias.masked_fill(~mask, hidden)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def masked(scores: Tensor, mask: Tensor | None, bias: Tensor | None, applied: str) -> Tensor:
    """Logits with what is hidden hidden."""
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores
    if applied == "fill":
        return scores.masked_fill(~mask, float("-inf"))
    if applied == "where":
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return scores + as_float(mask, None, applied, scores.dtype)
