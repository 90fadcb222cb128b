"""Rotary position embedding, found in the graph: x * cos + rotate_half(x) * sin."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from kvpass.match.calls import argument, call_name, operand
from kvpass.match.shapes import same, shape_of


class Rotation(NamedTuple):
    """What queries are rotated by.

    Attributes:
        before: the queries before it, [B, Hq, S, D].
        cos, sin: [1 or B, 1, S, D]; entry i of a head turns with entry i + D / 2.
    """

    before: fx.Node
    cos: fx.Node
    sin: fx.Node


def rotation(q: fx.Node) -> Rotation | None:
    """The rotation that made rotated queries [B, Hq, S, D]; None if it is another one, or of a part of each head."""
    if call_name(q) != "add":
        return None
    parts = [n for n in q.args[:2] if isinstance(n, fx.Node) and call_name(n) == "mul"]
    if len(parts) != 2:
        return None
    for plain, turned in (parts, parts[::-1]):
        for x, cos in (_pair(plain), _pair(plain)[::-1]):
            for half, sin in (_pair(turned), _pair(turned)[::-1]):
                if _is_half_turn(half, x) and _fits(cos, q) and _fits(sin, q):
                    return Rotation(x, cos, sin)
    return None


def unrounded(angle: fx.Node) -> fx.Node:
    """The cosines or sines before they were cast to the model's dtype: [.., S, D]."""
    while call_name(angle) in ("unsqueeze", "to"):
        above = operand(angle)
        if not isinstance(above, fx.Node):
            break
        angle = above
    return angle


def _pair(node: fx.Node) -> tuple[Any, Any]:
    return argument(node, 0, "input"), argument(node, 1, "other")


def _is_half_turn(node: Any, x: Any) -> bool:
    """cat([-x[.., D/2:], x[.., :D/2]], -1)"""
    if not isinstance(node, fx.Node) or not isinstance(x, fx.Node) or call_name(node) != "cat":
        return False
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or call_name(parts[0]) != "neg":
        return False
    second, first = operand(parts[0]), parts[1]
    return all(isinstance(part, fx.Node) and operand(part) is x for part in (first, second)) and _halves(first, second)


def _halves(first: fx.Node, second: fx.Node) -> bool:
    """Two slices of the last axis: up to a half, and from it on."""
    cuts = []
    for part in (first, second):
        index = argument(part, 1, "index") if call_name(part) == "getitem" else None
        last = index[-1] if isinstance(index, tuple) and index and index[0] is Ellipsis else None
        if not isinstance(last, slice) or last.step not in (None, 1):
            return False
        cuts.append(last)
    half = shape_of(first)[-1]
    starts = cuts[0].start in (None, 0) and isinstance(cuts[1].start, int) and same(cuts[1].start, half)
    return starts and same(shape_of(second)[-1], half)


def _fits(angle: Any, q: fx.Node) -> bool:
    """[1 or B, 1, S, D] beside queries [B, Hq, S, D]."""
    shape, wanted = shape_of(angle), shape_of(q)
    return len(shape) == len(wanted) == 4 and shape[1] == 1 and all(same(shape[i], wanted[i]) for i in (2, 3))
