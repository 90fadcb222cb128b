"""Where queries and keys come from: the projections above them, and whether these read the same sequence."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.graph.calls import PROJECTIONS, argument, call_name, example
from kvpass.graph.shapes import shape_of
from kvpass.graph.views import walk_up

LIMIT = 300
"""Nodes looked at above one projection."""


def foreign(q: fx.Node, k: fx.Node) -> bool:
    """True if q and k are projections of different inputs, looking back over two projections (MLA has two), and over
    what else is done to those inputs (each may have a norm of its own).
    """
    ours, theirs = set(_inputs(q)), set(_inputs(k))
    if not ours or not theirs or ours & theirs:
        return False
    ours, theirs = (found.union(*map(_inputs, found)) for found in (ours, theirs))  # long: up the whole residual stream
    return not ours & theirs and not _streams(ours) & _streams(theirs)


def block_input(value: fx.Node) -> fx.Node | None:
    """The hidden states [B, S, size] that an attention's new values are projected from; None if they come from several
    tensors, or from one of another form.
    """
    found = list(dict.fromkeys(_inputs(value)))
    return found[0] if len(found) == 1 and len(shape_of(found[0])) == 3 else None


def _streams(values: set[fx.Node]) -> set[fx.Node]:
    """What values of the size of hidden states are computed from, up to the nearest projections and inputs."""
    found, queue = set(values), list(values)
    for current in queue:
        if call_name(current) in PROJECTIONS | {"embedding"} or len(queue) > LIMIT:
            continue
        fresh = [n for n in current.all_input_nodes if n not in found and len(shape_of(n)) >= 3]
        found.update(fresh)
        queue += fresh
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Data inputs of the nearest projections above a node; its own, if it is one."""
    found: list[Any] = []
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if call_name(current) in PROJECTIONS:
            found.append(_data(current))
            continue
        fresh = [n for n in current.all_input_nodes if n not in seen and example(n) is not None]
        seen.update(fresh)
        queue += fresh
    return [_seen_through(data) for data in found if isinstance(data, fx.Node)]


def _seen_through(node: fx.Node) -> fx.Node:
    """What a value is a view of: decomposed projections each make a matrix of the same tokens."""
    return walk_up(node, lambda n: False)[0]


def _data(projection: fx.Node) -> Any:
    name = call_name(projection)
    if name == "einsum":
        return next(n for n in projection.all_input_nodes)
    return argument(projection, 1, "mat1") if name == "addmm" else argument(projection, 0, "input")
