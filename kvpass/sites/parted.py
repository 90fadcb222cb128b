"""Buffers of which one graph writes new tokens and another attends: what a graph break between the two leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.graph.calls import changes, is_input, source_line
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import whole
from kvpass.graph.shapes import shape_of
from kvpass.graph.views import walk_pieces
from kvpass.sites.site import Update


@dataclass(frozen=True)
class Half:
    """A buffer that a graph without a site writes to, or attends over.

    Attributes:
        place: of the buffer among the graph's inputs; -1 if the graph makes it.
        tokens: new ones that are written, or queries that attend.
        source: the line of the model.
        result: of the buffer among what the graph returns, if it is none of the inputs.
    """

    place: int
    tokens: int
    source: str
    result: int | None = None


def written(graph: fx.Graph, patterns: Any) -> list[Half]:
    """Buffers that get new tokens."""
    flow, inputs, found = Flow(graph), _inputs(graph), []
    for node in flow.nodes:
        for pattern in patterns.updates:
            try:
                update = pattern.match(node, flow)
            except Miss:
                continue
            if update is not None and update.write is not None and update.axis is not None:
                place = -1 if update.past is None else inputs.get(update.past, -1)
                result = None if place >= 0 and changes(update.write) else _returned(update, flow)
                if place >= 0 or result is not None:
                    tokens = _now(shape_of(update.new)[update.axis])
                    found.append(Half(place, tokens, source_line(update.write), result))
                break
    return found


def _returned(update: Update, flow: Flow) -> int | None:
    """Where a graph returns a buffer that it writes to."""
    nodes = [update.node, *([update.write] if update.write else []), *whole(update.node)]
    return next((at for node in nodes for at in flow.outputs.get(node, ())), None)


def attended(graph: fx.Graph, patterns: Any) -> list[Half]:
    """Buffers that an attention reads as its keys or its values: keys may be rotated only when they are read."""
    inputs, found = _inputs(graph), []
    for core in _cores(graph, patterns):
        bases = [walk_pieces(half, lambda node: node in inputs)[0] for half in core.cached]
        base = next((base for base in bases if base in inputs), None)
        if base is not None and "S" in core.axes.q:
            tokens = _now(shape_of(core.q)[core.axes.q.index("S")])
            found.append(Half(inputs[base], tokens, source_line(core.node)))
    return found


def _cores(graph: fx.Graph, patterns: Any) -> Iterator[Any]:
    for node in graph.nodes:
        for pattern in patterns.cores:
            try:
                core = pattern.match(node)
            except Miss:
                continue
            if core is not None:
                yield patterns.refined(core)
                break


def _inputs(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: at for at, node in enumerate(graph.find_nodes(op="placeholder")) if is_input(node)}


def _now(size: Any) -> int:
    """A size in the call that is compiled."""
    return size if isinstance(size, int) else int(size.node.hint)
