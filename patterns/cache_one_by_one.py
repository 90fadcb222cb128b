"""Tokens written into a buffer one by one, `buf[:, :, pos + i] = k[:, :, i]` for each i, as a loop leaves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.indices import by_axis, index_of, is_all
from kvpass.graph.shapes import normal_dim, same, shape_of

Where = tuple[fx.Node, int, Any, Any]
"""Buffer, axis, first place, new tokens."""


class One(NamedTuple):
    """A write of one token: its axis and place in the buffer, what it is taken out of, and which of those it is."""

    axis: int
    place: Any
    new: fx.Node
    at: int
    taken: fx.Node


def one_by_one(node: fx.Node) -> tuple[Where | None, tuple[fx.Node, ...]]:
    """All tokens of a call, at the last of the writes, and the nodes that are gone with it; None if it is not the
    last, or if some are missing.
    """
    last, buffer = _one(node), operand(node)
    if last is None or not same(shape_of(last.new)[last.axis], last.at + 1):
        return None, ()
    writes = [user for user in buffer.users if call_name(user) == "setitem" and operand(user) is buffer]
    found = [(user, _one(user)) for user in writes]
    ours = [(user, one) for user, one in found if one is not None and one.new is last.new and one.axis == last.axis]
    ours.sort(key=lambda pair: pair[1].at)
    first = ours[0][1]
    if len(ours) != last.at + 1 or ours[-1][0] is not node:
        return None, ()
    for at, (_, one) in enumerate(ours):
        if one.at != at or not _follows(one.place, first.place, at):
            return None, ()
    sizes = [*shape_of(buffer)]
    sizes[last.axis] = last.at + 1
    if len(sizes) != len(shape_of(last.new)):
        return None, ()
    order = {n: at for at, n in enumerate(node.graph.nodes)}
    gone = {one.taken for _, one in ours} | {user for user, _ in ours if user is not node}
    return (buffer, last.axis, first.place, last.new), tuple(sorted(gone, key=order.__getitem__))


def _one(node: fx.Node) -> One | None:
    buffer = operand(node)
    index, value = by_axis(index_of(node), len(shape_of(buffer))), node.args[2]
    places = [at for at, item in enumerate(index) if not is_all(item)]
    if len(places) != 1 or not _is_number(index[places[0]]) or not isinstance(value, fx.Node):
        return None
    axis, above = places[0], operand(value)
    picked = _picked(value, axis)
    return None if picked is None else One(axis, index[axis], above, picked, value)


def _picked(value: fx.Node, axis: int) -> int | None:
    """Which of an axis `x[:, :, i]`, `x.select(2, i)` takes."""
    above = operand(value)
    if not isinstance(above, fx.Node):
        return None
    sizes, at = shape_of(above), None
    if call_name(value) == "select":
        dim, at = argument(value, 1, "dim"), argument(value, 2, "index")
        if not isinstance(dim, int) or normal_dim(dim, len(sizes)) != axis:
            return None
    elif call_name(value) == "squeeze" and same(sizes[axis] if axis < len(sizes) else 0, 1):
        at = 0 if argument(value, 1, "dim") in (axis, axis - len(sizes)) else None
    elif call_name(value) == "getitem":
        index = by_axis(index_of(value), len(sizes))
        cut = [k for k, item in enumerate(index) if not is_all(item)]
        at = index[axis] if cut == [axis] else None
    if not isinstance(at, int) or isinstance(at, bool):
        return None
    size = sizes[axis]
    return at if at >= 0 else at + size if isinstance(size, int) else None


def _is_number(item: Any) -> bool:
    value = example(item) if isinstance(item, fx.Node) else item
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _follows(place: Any, first: Any, by: int) -> bool:
    a, b = (example(x) if isinstance(x, fx.Node) else x for x in (place, first))
    return same(a, b + by)
