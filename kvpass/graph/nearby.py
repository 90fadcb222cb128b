"""What feeds a cache, this side of projections and attentions: does a value grow out of an input of the call?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from kvpass.graph.calls import PROJECTIONS, argument, call_name, example, is_input, is_metadata, operand
from kvpass.graph.covering import covers
from kvpass.graph.shapes import is_empty, normal_dim, shape_of
from kvpass.graph.views import is_view

ENDS = PROJECTIONS | {"sdpa", "sdpa_aten", "flex_attention"}
SLICES = frozenset({"getitem", "slice", "narrow", "select", "index_select", "chunk", "split"})
COPIES = frozenset({"index_copy", "index_put", "scatter", "slice_scatter", "select_scatter"})
"""Writes that give a new tensor."""
LIMIT = 300
"""Nodes looked at around one value: far more than lies between a projection and a cache."""


def nearby(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Nodes that carry data from (`step` gives inputs) or to (users) `start`, short of projections and attentions."""
    queue, seen = [start], {start}
    for node in queue:
        yield node
        if call_name(node) in ENDS or len(queue) > LIMIT:
            continue
        fresh = [n for n in step(node) if n not in seen and call_name(n) not in ENDS and not is_metadata(n)]
        seen.update(fresh)
        queue += fresh


def whole(node: fx.Node) -> Iterator[fx.Node]:
    """A value and what it is a view or a slice of."""
    while True:
        yield node
        if not (is_view(node) or call_name(node) in SLICES) or not isinstance(operand(node), fx.Node):
            return
        node = operand(node)


def from_input(node: Any) -> bool:
    """True if a value is computed from an input of the call with 3 or more dimensions, without a projection."""
    if not isinstance(node, fx.Node):
        return False
    return any(is_input(n) and len(shape_of(n)) >= 3 for n in nearby(node, lambda n: n.all_input_nodes))


def grows(node: fx.Node) -> bool:
    """Does a `cat` put new tokens behind (something computed from) an input, or behind nothing? Never along the last
    axis: that is RoPE's rotation.
    """
    rank = len(shape_of(node))
    if call_name(node) != "cat" or rank < 3 or normal_dim(argument(node, 1, "dim", 0), rank) == rank - 1:
        return False
    parts = {part for part in argument(node, 0, "tensors") if isinstance(part, fx.Node)}
    return len(parts) > 1 and any(is_empty(shape_of(part)) or from_input(part) for part in parts)


def home_of(buffer: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """The tensor that a buffer is, or is one of, and its place in that. A `.to()` that changes nothing is the same
    tensor.
    """
    path: tuple[int, ...] = ()
    while True:
        above = operand(buffer)
        if call_name(buffer) == "to" and isinstance(above, fx.Node):
            before, after = example(above), example(buffer)
            if (before.dtype, before.device) != (after.dtype, after.device) or buffer.kwargs.get("copy"):
                return buffer, path
        elif covers(buffer):
            pass
        elif call_name(buffer) in ("getitem", "select") and isinstance(above, fx.Node):
            index = _places(buffer)
            if index is None or not shape_of(above):
                return buffer, path
            path = index + path
        else:
            return buffer, path
        buffer = above


def _places(node: fx.Node) -> tuple[int, ...] | None:
    """`x[2]`, `x[2, 0]`, `x.select(0, 2)`"""
    if call_name(node) == "select":
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
        return (index,) if dim == 0 and isinstance(index, int) else None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    while index and index[-1] in (slice(None, None, None), Ellipsis):
        index = index[:-1]
    places = tuple(item for item in index if isinstance(item, int))
    return places if places and len(places) == len(index) else None


def taken_out(stack: fx.Node, path: tuple[int, ...]) -> list[fx.Node]:
    """All nodes that take the buffer at `path` out of a stack of buffers; none if it is no stack."""
    found, queue = [], [stack] if path else []
    for node in queue:
        queue += [user for user in node.users if home_of(user) != (user, ()) and user not in queue]
        if home_of(node) == (stack, path):
            found.append(node)
    return found
