"""W_O: the projection that consumes an attention's output, found in the graph."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from kvpass.graph.calls import argument, call_name, is_metadata
from kvpass.graph.shapes import same, shape_of

VIEWS = frozenset({"transpose", "permute", "reshape", "contiguous", "clone", "to", "dropout", "type_as", "squeeze"})
FURTHEST = 8
"""Steps from an attention to its projection."""


class OutputProjection(NamedTuple):
    """The weight of an attention's output projection.

    Attributes:
        weight: [out, Hq * Dv], or [Hq * Dv, out] if `turned` (Conv1D, plain matrix products).
    """

    weight: fx.Node
    turned: bool


def output_projection(core: fx.Node, heads: int, wide: int) -> OutputProjection | None:
    """The projection of a core's output of `heads` query heads with `wide` entries each; None if something other than
    views and dropout lies between, or the heads are not laid out one behind the other.
    """
    node, laid_out = core, False
    for _ in range(FURTHEST):
        users = [user for user in node.users if not is_metadata(user)]
        if len(users) != 1:
            return None
        before, node = node, users[0]
        name = call_name(node)
        if name in ("linear", "matmul", "mm", "addmm"):
            return _weight(node, before, heads * wide) if laid_out else None
        if name not in VIEWS:
            return None
        shape = shape_of(before)
        laid_out = laid_out or (len(shape) >= 3 and same(shape[-1], wide) and same(shape[-2], heads))
    return None


def _weight(node: fx.Node, data: fx.Node, size: int) -> OutputProjection | None:
    name = call_name(node)
    at = 1 if name == "addmm" else 0
    if argument(node, at, "mat1" if at else "input") is not data:
        return None
    weight = argument(node, at + 1, {"linear": "weight", "addmm": "mat2"}.get(name, "other"))
    axis = 1 if name == "linear" else 0
    shape = shape_of(weight)
    good = isinstance(weight, fx.Node) and len(shape) == 2 and same(shape[axis], size)
    return OutputProjection(weight, axis == 0) if good else None
