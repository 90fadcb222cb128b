"""Where the cache lives between calls: what the host makes before the first call, and how a layer gets its cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from spellings.laid_out import Cells
from spellings.spelling import Spelling
from torch import Tensor


@dataclass
class Kept:
    """A host's own object: lists of tensors, and how many tokens they hold."""

    cells: list[Cells | None] = field(default_factory=list)
    at: int = 0


def before_first_call(spelling: Spelling, shapes: list[list[tuple[int, ...]]]) -> Any:
    """What the caller passes to the first call; None where the module keeps the cache itself.

    Args:
        shapes: of the cells of each layer, with room for all tokens, or for none.
    """
    if spelling.home in ("stack_lk", "views"):
        return torch.zeros(len(shapes), 2, *shapes[0][0])
    if spelling.home == "stack_kl":
        return torch.zeros(2, len(shapes), *shapes[0][0])
    cells = allocated(spelling, shapes)
    if spelling.home == "tuple":
        return None if cells[0] is None else tuple(ordered(spelling, c) for c in cells)
    if spelling.home == "dict":
        return {i: c for i, c in enumerate(cells) if c is not None}
    if spelling.home == "list":
        return cells
    return Kept(cells) if spelling.home == "object" else None


def allocated(spelling: Spelling, shapes: list[list[tuple[int, ...]]]) -> list[Any]:
    """Cells of each layer as the host allocates them; None for a layer where the first call makes them."""
    if spelling.origin in ("nothing", "made", "made_like"):
        return [None for _ in shapes]
    return [tuple(torch.zeros(shape) for shape in layer) for layer in shapes]


def given(spelling: Spelling, cache: Any, layers: int) -> Any:
    """What a call is given of what the host holds."""
    if spelling.home == "views":
        return tuple((cache[i, 0], cache[i, 1]) for i in range(layers))
    return cache


def ordered(spelling: Spelling, cells: Cells) -> Cells:
    """Between (keys, values) and the order that the cache has; its own inverse."""
    return (cells[1], cells[0]) if spelling.returned == "values_first" else cells


def taken(spelling: Spelling, cache: Any, layer: Any, i: int) -> Cells | None:
    """A layer's cells; None before there are any."""
    home = spelling.home
    if home in ("attribute", "buffer"):
        return layer.held()
    if home == "stack_lk":
        return cache[i, 0], cache[i, 1]
    if home == "stack_kl":
        return cache[0, i], cache[1, i]
    if home == "object":
        return cache.cells[i]
    if home == "dict":
        return cache.get(i)
    if home == "list":
        return cache[i]
    return None if cache is None else ordered(spelling, cache[i])


def put(spelling: Spelling, cache: Any, layer: Any, i: int, cells: Cells) -> None:
    """Into a home that is not returned anew."""
    home = spelling.home
    if home in ("attribute", "buffer"):
        layer.hold(cells)
    elif home == "object":
        cache.cells[i] = cells
    elif home in ("dict", "list"):
        cache[i] = cells


def returned(spelling: Spelling, logits: Tensor, cache: Any, grown: list[Cells]) -> Any:
    """What a call gives back."""
    if spelling.returned == "logits":
        return logits
    if spelling.home == "tuple":
        cache = tuple(ordered(spelling, cells) for cells in grown)
    if spelling.returned == "nested":
        return {"logits": logits, "state": {"cache": cache}}
    return logits, cache


def unpacked(spelling: Spelling, result: Any, cache: Any) -> tuple[Tensor, Any]:
    """Logits and the cache to go on with, of what a call gave back."""
    if spelling.returned == "logits":
        return result, cache
    if spelling.returned == "nested":
        return result["logits"], result["state"]["cache"]
    return result[0], result[1]
