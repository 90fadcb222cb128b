"""Rotary position embedding, found in the graph: entry i of a head turns with entry i + D / 2.

Two spellings: x * cos + cat([-x2, x1]) * sin, and cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos]).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.shapes import same, shape_of


class Rotation(NamedTuple):
    """What queries or keys are rotated by.

    Attributes:
        before: what is rotated, [B, H, S, D].
        cos, sin: broadcast to [1 or B, 1, S, D], or [.., D / 2].
    """

    before: fx.Node
    cos: fx.Node
    sin: fx.Node

    @property
    def halved(self) -> bool:
        """Whether cosines and sines stand once for both halves of a head."""
        return not same(shape_of(self.cos)[-1], shape_of(self.before)[-1])


def rotation(q: fx.Node) -> Rotation | None:
    """The rotation that made rotated queries or keys [B, H, S, D]; None if it is another one, or of a part of each
    head.
    """
    found = _whole(q) if call_name(q) == "add" else _by_halves(q) if call_name(q) == "cat" else None
    return found if found and _fits(found.cos, q) and _fits(found.sin, q) else None


def _whole(q: fx.Node) -> Rotation | None:
    """x * cos + rotate_half(x) * sin"""
    for plain, turned in _products(q):
        for x, cos in (plain, plain[::-1]):
            for half, sin in (turned, turned[::-1]):
                if _is_half_turn(half, x):
                    return Rotation(x, cos, sin)
    return None


def _by_halves(q: fx.Node) -> Rotation | None:
    """cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)"""
    parts = argument(q, 0, "tensors")
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or argument(q, 1, "dim") not in (-1, 3):
        return None
    for one, other in _products(parts[0], "sub")[:1]:
        for x1, cos in (one, one[::-1]):
            for x2, sin in (other, other[::-1]):
                x, y = _half_of(x1), _half_of(x2)
                if x is None or y is None or x[0] is not y[0] or (x[1], y[1]) != (0, 1):
                    continue
                if any({*a} == {x1, sin} and {*b} == {x2, cos} for a, b in _products(parts[1])):
                    return Rotation(x[0], cos, sin)
    return None


def _products(node: Any, joined: str = "add") -> list[tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """The operands of two products that are added or subtracted, in both orders; none if it is something else."""
    if not isinstance(node, fx.Node) or call_name(node) != joined:
        return []
    parts = [n for n in node.args[:2] if isinstance(n, fx.Node) and call_name(n) == "mul"]
    if len(parts) != 2:
        return []
    first, second = (_pair(part) for part in parts)
    return [(first, second), (second, first)]


def _half_of(node: Any) -> tuple[fx.Node, int] | None:
    """What a node is the first (0) or second (1) half of, along the last axis."""
    if not isinstance(node, fx.Node) or call_name(node) != "getitem":
        return None
    above, index = operand(node), argument(node, 1, "index")
    if index in (0, 1) and isinstance(above, fx.Node) and call_name(above) in ("chunk", "split"):
        source, axis = operand(above), argument(above, 2, "dim")
        whole = isinstance(source, fx.Node) and axis in (-1, 3)
        return (source, index) if whole and same(2 * shape_of(node)[-1], shape_of(source)[-1]) else None
    start = _cut(node)
    if start is None or not isinstance(above, fx.Node) or not same(2 * shape_of(node)[-1], shape_of(above)[-1]):
        return None
    return above, 0 if start == 0 else 1


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
    return _half_of(operand(parts[0])) == (x, 1) and _half_of(parts[1]) == (x, 0)


def _cut(part: fx.Node) -> Any:
    """Where a slice of the last axis begins; None for another index."""
    index = argument(part, 1, "index")
    last = index[-1] if isinstance(index, tuple) and index and index[0] is Ellipsis else None
    if not isinstance(last, slice) or last.step not in (None, 1):
        return None
    return last.start or 0


def _fits(angle: Any, q: fx.Node) -> bool:
    """Angles that broadcast to [1 or B, 1, S, D] or [.., D / 2], beside queries [B, H, S, D]."""
    if not isinstance(angle, fx.Node):
        return False
    shape, wanted = shape_of(angle), shape_of(q)
    if len(wanted) != 4 or not 2 <= len(shape) <= 4 or (len(shape) > 2 and shape[-3] != 1):
        return False
    wide = same(shape[-1], wanted[3]) or same(2 * shape[-1], wanted[3])
    return wide and same(shape[-2], wanted[2])
