"""Buffers of which one graph writes new tokens and another attends: what a graph break between the two leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.graph.calls import changes, is_input, source_line
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import shape_of
from kvpass.graph.views import walk_pieces


@dataclass(frozen=True)
class Half:
    """A buffer that a graph without a site writes to, or attends over.

    Attributes:
        place: of the buffer among the graph's inputs.
        tokens: new ones that are written, or queries that attend.
        source: the line of the model.
        result: of the buffer among what the graph returns, if the write makes another tensor of it.
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
            if update is not None and update.write is not None and update.past in inputs and update.axis is not None:
                tokens = _now(shape_of(update.new)[update.axis])
                result = None if changes(update.write) else next(iter(flow.outputs.get(update.node, ())), None)
                found.append(Half(inputs[update.past], tokens, source_line(update.write), result))
                break
    return found


def attended(graph: fx.Graph, patterns: Any) -> list[Half]:
    """Buffers that an attention reads as its keys."""
    inputs, found = _inputs(graph), []
    for core in _cores(graph, patterns):
        base = walk_pieces(core.cached[0], lambda node: node in inputs)[0]
        if base in inputs and "S" in core.axes.q:
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
