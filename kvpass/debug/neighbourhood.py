"""What surrounds one site, as a small networkx graph of boxes: projections, cache, attention, ops; the rest is folded.

A node of the result is a number with a `Box` under "box"; an edge may have a "label". Only reads fx graphs.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from kvpass.debug.source import describe
from kvpass.graph.calls import call_name, example, is_metadata
from kvpass.graph.dataflow import Flow
from kvpass.graph.module_names import module_path
from kvpass.sites.site import Site

PROJECTIONS = frozenset({"linear", "matmul", "addmm", "mm", "bmm", "einsum", "conv1d"})
OUTPUTS = {
    "prefill_attend": ("out", "stats", "valid"),
    "join_slots": ("k", "v", "pos", "stats"),
    "score_slots": ("score", "stats", "cursor"),
}
"""What the ops with several results return, for edge labels."""

_RANK = list(dict.fromkeys(name for names in OUTPUTS.values() for name in names))

REACH = 80
"""Visits of the search for the nearest projection."""


@dataclass(frozen=True)
class Box:
    """One box of a drawing: `kind` is input, projection, folded, cache, mask, core, kvpass or state."""

    kind: str
    title: str
    detail: str = ""


def before(captured: fx.GraphModule, site: Site) -> nx.DiGraph[Any]:
    """The site as the model wrote it."""
    view = _View(captured.graph)
    core, halves = site.core, {"K": site.key, "V": site.value}
    view.add(core.node, Box("core", call_name(core.node), _core_detail(site)))
    for letter, half in halves.items():
        view.add(half.update.node, Box("cache", f"{letter} cache: {half.update.form.value}", _shape(half.update.node)))
        if half.update.past is not None:
            view.add(half.update.past, Box("cache", f"past {letter}", _shape(half.update.past)))
    if core.mask is not None:
        view.add(core.mask, Box("mask", "mask", _shape(core.mask)))
    view.surround([core.q, halves["K"].update.new, halves["V"].update.new], core.node, core.node)
    graph = view.boxes()
    where = ", ".join(f"{letter} at {', '.join(map(str, half.places))}" for letter, half in halves.items())
    host = _append(graph, Box("cache", "outputs: the host's cache grows", where))
    graph.add_edges_from((view.number[half.update.node], host) for half in halves.values())
    return graph


def after(rewritten: fx.GraphModule, site: Site) -> nx.DiGraph[Any]:
    """The site as kvpass rewrote it; the ops write the state in place, which is drawn as a second box of it."""
    view = _View(rewritten.graph)
    named = {n.name: n for n in rewritten.graph.nodes}
    ours = [n for n in rewritten.graph.nodes if n.meta.get("kvpass", {}).get("layer") == site.layer]
    ops = [n for n in ours if _op_name(n)]
    state = [n for n in ours if n.op == "placeholder"]
    for op in ops:
        view.add(op, Box("kvpass", f"kvpass::{_op_name(op)}", _shape(op)))
    for letter, half in (("K", site.key), ("V", site.value)):
        past = half.update.past and named.get(half.update.past.name)
        if past is not None and past.users:
            view.add_together(_with_sizes(past), Box("cache", f"past {letter}: a shell", "only its length is read"))
    if site.core.mask is not None and site.core.mask.name in named:
        view.add(named[site.core.mask.name], Box("mask", "mask", "looked up at each slot's position"))
    view.add_together(
        [n for s in state for n in _with_sizes(s)], Box("state", "state of the site", "k, v, pos, stats, cursor")
    )
    starts = [named[n.name] for n in (site.core.q, site.key.update.new, site.value.update.new) if n.name in named]
    attend = next(op for op in ops if _op_name(op) in ("prefill_attend", "decode_attend"))
    view.surround(starts, attend, ops[-1], ours)
    graph = view.boxes()
    written = _append(graph, Box("state", "same state, updated in place", "the shells returned as K and V carry it"))
    graph.add_edge(view.number[ops[-1]], written, label="writes")
    return graph


class _View:
    """Groups fx nodes into numbered boxes; nodes of the region that nobody claimed are folded with their neighbours."""

    def __init__(self, graph: fx.Graph) -> None:
        self.flow = Flow(graph)
        self.number: dict[fx.Node, int] = {}
        self.box: dict[int, Box] = {}
        self.region: set[fx.Node] = set()

    def add(self, node: fx.Node, box: Box) -> None:
        self.add_together([node], box)

    def add_together(self, nodes: Iterable[fx.Node], box: Box) -> None:
        """Put several nodes into one box; a node that already has a box keeps it."""
        fresh = [node for node in nodes if node not in self.number]
        if not fresh:
            return
        at = len(self.box)
        self.box[at] = box
        self.number.update((node, at) for node in fresh)
        self.region.update(fresh)

    def surround(self, starts: list[fx.Node], attend: fx.Node, last: fx.Node, extra: Iterable[fx.Node] = ()) -> None:
        """Take in what lies between the projections above, the attention, and the projection below."""
        for start in starts:
            top = self._projection(start, upwards=True) or start
            if top is not start:
                self.add(top, Box("projection", _projection_title(top), _shape(top)))
                self.add_together(_data_input(top), Box("input", "hidden states", _shape(_data_input(top)[0])))
            self.region |= self.flow.between(top, attend) | self.flow.between(top, last) | {start}
        bottom = self._projection(attend, upwards=False)
        if bottom is not None:
            self.add(bottom, Box("projection", _projection_title(bottom), _shape(bottom)))
            self.region |= self.flow.between(attend, bottom)
        self.region |= set(extra)

    def _projection(self, start: fx.Node, upwards: bool) -> fx.Node | None:
        """Nearest projection above or below a node, breadth first."""
        queue, seen = deque([start]), {start}
        while queue and len(seen) < REACH:
            node = queue.popleft()
            if node is not start and node.op == "call_function" and call_name(node) in PROJECTIONS:
                return node
            near = node.all_input_nodes if upwards else list(node.users)
            fresh = [n for n in near if n not in seen and n.op != "output"]
            seen.update(fresh)
            queue.extend(fresh)
        return None

    def boxes(self) -> nx.DiGraph[Any]:
        """The drawing's graph: claimed boxes, folded boxes, and the edges between them."""
        self._fold()
        graph: nx.DiGraph[Any] = nx.DiGraph()
        graph.add_nodes_from((at, {"box": box}) for at, box in self.box.items())
        for node in self.region:
            for user in node.users:
                if user in self.region and self.number[node] != self.number[user]:
                    self._edge(graph, node, user)
        lonely = [at for at in graph if graph.degree(at) == 0]
        graph.remove_nodes_from(lonely)
        return graph

    def _fold(self) -> None:
        rest = [n for n in self.flow.nodes if n in self.region and n not in self.number]
        results = {n for n in rest if _result_of(n) in self.number}
        for node in results:
            self.number[node] = self.number[_result_of(node)]
        plain = self.flow.graph.subgraph(set(rest) - results)
        for part in sorted(
            nx.weakly_connected_components(plain), key=lambda p: min(map(self.flow.order.__getitem__, p))
        ):
            ordered = sorted(part, key=self.flow.order.__getitem__)
            self.add_together(ordered, Box("folded", _folded(ordered), _shape(ordered[-1])))

    def _edge(self, graph: nx.DiGraph[Any], node: fx.Node, user: fx.Node) -> None:
        ends = self.number[node], self.number[user]
        label = _result_name(node)
        known = graph.edges[ends]["labels"] if graph.has_edge(*ends) else []
        labels = [*known, label] if label and label not in known else known
        graph.add_edge(*ends, labels=labels, label=", ".join(sorted(labels, key=_RANK.index)))


def _with_sizes(tensor: fx.Node) -> list[fx.Node]:
    """A tensor and the nodes that read its sizes."""
    return [tensor, *(user for user in tensor.users if is_metadata(user))]


def _append(graph: nx.DiGraph[Any], box: Box) -> int:
    at = max(graph, default=-1) + 1
    graph.add_node(at, box=box)
    return at


def _op_name(node: fx.Node | None) -> str:
    """`prefill_attend` for a call of torch.ops.kvpass.prefill_attend, '' for any other node."""
    target = str(node.target) if node is not None and node.op == "call_function" else ""
    return target.split(".")[1] if target.startswith("kvpass.") else ""


def _result_of(node: fx.Node) -> Any:
    """The kvpass op of which a node takes one result; None for other nodes."""
    source = node.args[0] if node.op == "call_function" and call_name(node) == "getitem" else None
    return source if isinstance(source, fx.Node) and _op_name(source) in OUTPUTS else None


def _result_name(node: fx.Node) -> str:
    source = _result_of(node)
    return OUTPUTS[_op_name(source)][node.args[1]] if source is not None else ""  # type: ignore[index]  # a getitem's int


def _data_input(projection: fx.Node) -> list[fx.Node]:
    at = 1 if call_name(projection) == "addmm" else 0
    value = projection.args[at] if len(projection.args) > at else projection.all_input_nodes[0]
    return [value] if isinstance(value, fx.Node) else projection.all_input_nodes[:1]


def _projection_title(node: fx.Node) -> str:
    """`q_proj`: from the weight's name if it tells, else the module, else the node."""
    for weight in node.all_input_nodes:
        found = re.search(r"(?:modules_|^l_)(\w+?)_parameters_weight_?$", weight.name)
        if found:
            return found.group(1).split("modules_")[-1]
    return module_path(node).rpartition(".")[2] or node.name


def _folded(nodes: list[fx.Node]) -> str:
    """Names of folded calls, most frequent kinds kept in order of appearance."""
    counts = Counter(call_name(n) or n.op for n in nodes)
    parts = [name if count == 1 else f"{name} x{count}" for name, count in counts.items()]
    return " · ".join(parts[:3]) + (f" · +{len(parts) - 3} more" if len(parts) > 3 else "")


def _core_detail(site: Site) -> str:
    return f"scale {site.core.scale:.4g}" + (", causal" if site.core.causal else "") + f", {_shape(site.core.node)}"


def _shape(node: fx.Node) -> str:
    return describe(example(node))
