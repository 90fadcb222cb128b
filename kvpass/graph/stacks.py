"""Caches that are taken apart, grown part by part and put together again: GPT-2's presents.

    k, v = past.unbind(0);  k, v = cat([k, new_k], 2), cat([v, new_v], 2);  present = stack([k, v])

is `cat([past, stack([new_k, new_v])], 3)`, of which the attention reads parts: rewritten so, it is a cache like others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, is_input, operand
from kvpass.graph.factors import APART
from kvpass.graph.making import made
from kvpass.graph.shapes import normal_dim, same, shape_of


class Stack(NamedTuple):
    """What is put together along `dim` of `past`, each of its parts grown along `axis` (of the whole)."""

    node: fx.Node
    past: fx.Node
    dim: int
    axis: int
    grown: tuple[fx.Node, ...]
    new: tuple[fx.Node, ...]


def found(graph: fx.Graph) -> list[Stack]:
    """All of them in a graph that can be written otherwise."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    found = (_stack(node) for node in graph.nodes if call_name(node) in ("stack", "cat"))
    return [one for one in found if one is not None and _in_time(one, order)]


def rewrite(graph: fx.Graph, stack: Stack) -> None:
    """Grow the whole, and take the parts out of it."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    last = max((stack.past, *stack.new), key=order.__getitem__)
    with graph.inserting_after(last):
        together = made(graph, stack.node, _FUNCTIONS[call_name(stack.node)], list(stack.new), stack.dim)
    with graph.inserting_after(together):
        whole = made(graph, stack.node, torch.cat, [stack.past, together], stack.axis)
    after, start = whole, 0
    for at, part in enumerate(stack.grown):
        if set(part.users) == {stack.node}:
            start += shape_of(part)[stack.dim] if call_name(stack.node) == "cat" else 0
            continue
        with graph.inserting_after(after):
            if call_name(stack.node) == "stack":
                after = made(graph, stack.node, torch.select, whole, stack.dim, at)
            else:
                size = shape_of(part)[stack.dim]
                after, start = made(graph, stack.node, torch.narrow, whole, stack.dim, start, size), start + size
        part.replace_all_uses_with(after, delete_user_cb=lambda user: user is not stack.node)
    stack.node.replace_all_uses_with(whole)
    graph.erase_node(stack.node)
    for part in stack.grown:
        piece: Any = argument(part, 0, "tensors")[0]
        graph.erase_node(part)
        while isinstance(piece, fx.Node) and piece.op != "placeholder" and not piece.users and not piece._erased:
            above = operand(piece)
            graph.erase_node(piece)
            piece = above


_FUNCTIONS: dict[str, Any] = {"stack": torch.stack, "cat": torch.cat}


def _stack(node: fx.Node) -> Stack | None:
    parts, rank = argument(node, 0, "tensors"), len(shape_of(node))
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not all(isinstance(p, fx.Node) for p in parts):
        return None
    dim, whole = normal_dim(argument(node, 1, "dim", 0), rank), call_name(node) == "stack"
    axes: set[int] = set()
    new: list[fx.Node] = []
    pasts: set[fx.Node] = set()
    start = 0
    for at, part in enumerate(parts):
        pair: Any = argument(part, 0, "tensors") if call_name(part) == "cat" else ()
        if len(pair) != 2 or not all(isinstance(p, fx.Node) for p in pair):
            return None
        axis = normal_dim(argument(part, 1, "dim", 0), len(shape_of(part)))
        axes.add(axis + (whole and axis >= dim))
        size = shape_of(part)[dim] if not whole else None
        past = _taken_from(pair[0], dim, at if whole else start, size)
        if past is None:
            return None
        start += 0 if size is None else size
        pasts.add(past)
        new.append(pair[1])
    past, axis = pasts.pop(), axes.pop()
    if pasts or axes or dim == axis or not same(shape_of(past)[dim], len(parts) if whole else start):
        return None
    return Stack(node, past, dim, axis, tuple(parts), tuple(new))


def _taken_from(piece: fx.Node, dim: int, start: int, size: Any) -> fx.Node | None:
    """The input that a piece is taken out of, at `start` along `dim`; `size` None: one, without its axis."""
    above = operand(piece)
    if not isinstance(above, fx.Node):
        return None
    name = call_name(piece)
    if name == "getitem" and call_name(above) in APART and isinstance(piece.args[1], int):
        source, tensors = operand(above), example(above)
        along: Any = argument(above, 1 if call_name(above) == "unbind" else 2, "dim", 0)
        if not isinstance(source, fx.Node) or normal_dim(along, len(shape_of(source))) != dim:
            return None
        if (call_name(above) == "unbind") != (size is None):
            return None
        at = piece.args[1] % len(tensors)
        begins = at if size is None else sum(t.shape[dim] for t in tensors[:at])
        return source if is_input(source) and same(begins, start) else None
    if size is None and is_input(above):
        selects = name == "select" and argument(piece, 1, "dim") == dim and argument(piece, 2, "index") == start
        indexes = name == "getitem" and dim == 0 and piece.args[1] == start
        return above if selects or indexes else None
    return None


def _in_time(stack: Stack, order: dict[fx.Node, int]) -> bool:
    """Are all new tokens there before any grown part is read?"""
    last = max(order[node] for node in stack.new)
    return all(order[user] > last for part in stack.grown for user in part.users)
