"""Entries of a stack of buffers, indexed at once: `stack[layer, 0, :, a:b] = k` is `stack[layer, 0][:, a:b] = k`.

So that the write and the read of one buffer are spelled in one way, wherever the buffer lies.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvpass.graph.calls import call_name, is_input, operand
from kvpass.graph.indices import by_axis, index_of
from kvpass.graph.making import made
from kvpass.graph.shapes import shape_of

LEAST = 5
"""Axes of a stack of buffers."""


def found(graph: fx.Graph) -> list[fx.Node]:
    """Writes to and reads of parts of an entry of an input."""
    return [node for node in graph.nodes if call_name(node) in ("getitem", "setitem") and _leads(node)]


def rewrite(graph: fx.Graph, node: fx.Node) -> None:
    """Take the entry first, then the part of it."""
    stack, count, index = operand(node), _leads(node), index_of(node)
    with graph.inserting_before(node):
        first = made(graph, node, operator.getitem, stack, index[:count])
    node.args = (first, index[count:], *node.args[2:])


def _leads(node: fx.Node) -> int:
    """How many numbers the index begins with, if axes of a buffer follow; else 0."""
    stack: Any = operand(node)
    if not isinstance(stack, fx.Node) or not is_input(stack) or len(shape_of(stack)) < LEAST:
        return 0
    index = index_of(node)
    count = next((at for at, item in enumerate(index) if not isinstance(item, int) or isinstance(item, bool)), 0)
    rest = len(shape_of(stack)) - count
    plain = all(isinstance(item, (slice, fx.Node)) or item is Ellipsis for item in index[count:])
    return count if count and plain and rest >= LEAST - 2 and len(by_axis(index[count:], rest)) == rest else 0
