"""Dataflow questions about a traced graph, asked of networkx: what escapes, what lies between, what is below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import networkx as nx
from torch import fx

from kvpass.graph.calls import call_name, is_input, is_metadata
from kvpass.graph.shapes import shape_of


class Flow:
    """The graph of values of one fx.Graph, built once per scan.

    Attributes:
        graph: DiGraph of fx nodes, an edge from each value to each reader.
        outputs: nodes returned by the graph, with their places in the output tuple.
        nodes, order: all nodes in the graph's order, and the place of each in it.
        output: the output node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph: nx.DiGraph[fx.Node] = nx.DiGraph()
        self.nodes = list(graph.nodes)
        self.order = {node: at for at, node in enumerate(self.nodes)}
        self.graph.add_nodes_from(self.order)
        self.graph.add_edges_from((node, user) for node in self.order for user in node.users)
        self.output = self.nodes[-1]
        self.outputs: dict[fx.Node, list[int]] = {}
        for at, value in enumerate(flat_outputs(self.output)):
            if isinstance(value, fx.Node):
                self.outputs.setdefault(value, []).append(at)

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """Nodes on some path from start to end, both included; empty if there is none."""
        near = self._window(start, end)
        if start not in near or end not in near:
            return set()
        down = nx.descendants(near, start) | {start}
        return down & (nx.ancestors(near, end) | {end}) if end in down else set()

    def escapes(self, region: Iterable[fx.Node], allowed: Iterable[fx.Node]) -> list[fx.Node]:
        """Readers of the region's values that are neither in it, nor allowed, nor the output, nor metadata reads."""
        inside = set(region) | set(allowed) | {self.output}
        readers = {user for node in region for user in self.graph.successors(node)}
        return sorted((r for r in readers - inside if not is_metadata(r)), key=self.order.__getitem__)

    def below(self, start: fx.Node, names: frozenset[str], limit: int = 200) -> Iterator[fx.Node]:
        """Nodes below `start` (breadth first, at most `limit` visits) whose call is one of `names`."""
        for _, node in islice(nx.bfs_edges(self.graph, start), limit):
            if call_name(node) in names:
                yield node

    def _window(self, start: fx.Node, end: fx.Node) -> nx.DiGraph[fx.Node]:
        """The stretch of the graph between two nodes: all that a path between them can touch."""
        return self.graph.subgraph(self.nodes[self.order[start] : self.order[end] + 1])


def flat_outputs(output: fx.Node) -> list[object]:
    """The output tuple of a graph as a list."""
    values = output.args[0]
    return list(values) if isinstance(values, (tuple, list)) else [values]


def data_inputs(graph: fx.Graph) -> list[int]:
    """Places of inputs of the call (no weights) with 3 or more dimensions that the graph computes with."""
    places = enumerate(node for node in graph.nodes if node.op == "placeholder")
    return [at for at, n in places if is_input(n) and len(shape_of(n)) >= 3 and any(map(_reads, n.users))]


def _reads(user: fx.Node) -> bool:
    return user.op != "output" and not is_metadata(user)
