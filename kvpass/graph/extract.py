"""A value of a traced graph as a function of the graph's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.errors import Reason
from kvpass.graph.calls import changes, operand
from kvpass.graph.miss import Miss

LIMIT = 60
"""Nodes that a value may depend on: an index is some arithmetic on a counter, not the output of a model."""


def ancestors(*nodes: fx.Node, free: fx.Node | None = None, limit: int = LIMIT) -> list[fx.Node]:
    """The nodes that values are computed from, themselves too, in the graph's order; not those above `free`.

    Raises:
        Miss: UNSUPPORTED_UPDATE: there are too many, or one of them is changed in place before the value is read.
    """
    node, found, queue = nodes[-1], {*nodes}, [*nodes]
    for current in queue:
        above = [] if current is free else current.all_input_nodes
        fresh = [upper for upper in above if upper not in found]
        found.update(fresh)
        queue += fresh
        if len(queue) > limit:
            raise Miss(Reason.UNSUPPORTED_UPDATE, node, "where the new tokens are written takes too much computing")
    order = {n: at for at, n in enumerate(node.graph.nodes)}
    for upper in found:
        for user in upper.users:
            if changes(user) and operand(user) is upper and order[user] < order[node]:
                raise Miss(Reason.UNSUPPORTED_UPDATE, user, f"{upper.name} is changed before it says where to write")
    return sorted(found, key=order.__getitem__)


def function_of(gm: fx.GraphModule, node: fx.Node) -> Callable[[Sequence[Any]], Any]:
    """A function from the inputs of a graph to the value of one of its nodes, run eagerly."""
    run = functions_of(gm, (node,))
    return lambda args: run(args)[0]


def functions_of(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], free: fx.Node | None = None, limit: int = LIMIT
) -> Callable[..., Any]:
    """A function from the inputs of a graph to the values of some of its nodes, a tuple; with `free`, from the inputs
    and a value for that node. Run eagerly.
    """
    graph = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    places: list[int] = []
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if free is not None:
        copy[free] = graph.placeholder("kvpass_free")
    for current in ancestors(*nodes, free=free, limit=limit):
        if current is free:
            continue
        if current.op == "placeholder":
            places.append(inputs.index(current))
        copy[current] = graph.node_copy(current, copy.__getitem__)
    graph.output(tuple(copy[node] for node in nodes))
    with _use_lazy_graph_module(True):
        part = _make_graph_module(gm, graph, class_name="KVPassIndex")

    def call(args: Sequence[Any], *given: Any) -> Any:
        with torch.no_grad():
            return part(*given, *(args[at] for at in places))

    return call
