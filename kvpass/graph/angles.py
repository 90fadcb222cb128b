"""The positions that a rotation's cosines and sines are computed from, found in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example
from kvpass.graph.extract import ancestors
from kvpass.graph.rope import Rotation, unrounded
from kvpass.graph.shapes import same, shape_of

_LOOKUPS = {"getitem": (1, "index"), "index": (1, "indices"), "index_select": (2, "index"), "embedding": (0, "input")}
"""What reads a table, and where its index is among the arguments."""


def angle_nodes(found: Rotation) -> tuple[fx.Node, fx.Node]:
    """Cosines and sines as they were before they were rounded to the model's dtype."""
    return unrounded(found.cos), unrounded(found.sin)


def positions_of(found: Rotation, tokens: Any) -> tuple[list[fx.Node], bool]:
    """Nodes that may be the positions of a call's tokens, the nearest to the angles first; and whether they are looked
    up in a table: then only the indices themselves are named.

    Raises:
        Miss: the angles take too much computing, or something that they depend on is changed in place.
    """
    above = ancestors(*angle_nodes(found))
    indices = [index for node in above for index in _tensors_of_lookup(node)]
    named = indices or [node for node in above if _counts(node)]
    fitting = [node for node in reversed(named) if any(_may_be(size, tokens) for size in shape_of(node))]
    return list(dict.fromkeys(fitting)), bool(indices)


def _may_be(size: Any, tokens: Any) -> bool:
    return not isinstance(size, int) or same(size, tokens)


def _tensors_of_lookup(node: fx.Node) -> list[fx.Node]:
    place = _LOOKUPS.get(call_name(node))
    index = argument(node, *place) if place else None
    parts = index if isinstance(index, (tuple, list)) else [index]
    return [part for part in parts if isinstance(part, fx.Node) and isinstance(example(part), torch.Tensor)]


def _counts(node: fx.Node) -> bool:
    """Whether a node holds whole numbers: of an integer dtype, or counted in floats."""
    value = example(node)
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
        return False
    return call_name(node) == "arange" or not (value.is_floating_point() or value.is_complex())
