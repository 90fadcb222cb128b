"""Slices that keep the last tokens of a value: what a layer with a sliding window stores."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.indices import by_axis, index_of, is_all
from kvpass.graph.shapes import normal_dim, shape_of


def keeps_the_end(node: fx.Node, axis: int) -> bool:
    """`x[:, :, -n:]` along this axis, and everything along the others."""
    if call_name(node) == "slice":
        dim = normal_dim(argument(node, 1, "dim", 0), len(shape_of(operand(node))))
        return dim == axis and _negative(argument(node, 2, "start"))
    if call_name(node) != "getitem":
        return False
    index = by_axis(index_of(node), len(shape_of(operand(node))))
    cut = [at for at, item in enumerate(index) if not is_all(item)]
    if cut != [axis] or not isinstance(index[axis], slice):
        return False
    return _negative(index[axis].start) and index[axis].stop is None


def _negative(start: Any) -> bool:
    return isinstance(start, int) and start < 0
