"""Box graphs as SVG: layers from networkx, places by barycentres, drawn with matplotlib. No GUI, no global state."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path as FilePath
from statistics import fmean
from typing import Any

import networkx as nx

COLOURS = {
    "input": ("#f4f4f1", "#8c8c84"),
    "projection": ("#e3ecf7", "#3f6ea5"),
    "folded": ("#fbfbf9", "#c4c4bb"),
    "cache": ("#fdf0d5", "#c98a1b"),
    "mask": ("#f1e9f6", "#8a63a8"),
    "core": ("#e6f2e6", "#4b8b4b"),
    "kvpass": ("#d93a2b", "#9c2117"),
    "state": ("#fbdcd7", "#d93a2b"),
}
"""Fill and border by the kind of a box."""

LINE, GAP_X, GAP_Y = 0.17, 0.45, 0.5
"""Height of a line of text, and gaps between boxes, in inches."""

WIDE, NARROW = 0.078, 0.066
"""Inches per character of a title and of a detail."""

JOINT = 0.2
"""Width that an edge takes where it passes through a layer."""

SWEEPS = 12


def draw(graph: nx.DiGraph[Any], path: FilePath, title: str) -> None:
    """Write a box graph (`neighbourhood`) as an SVG, or as what the suffix of `path` says.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places, sizes = layout(graph)
    width, height = _extent(places, sizes)
    with rc_context({"svg.hashsalt": "kvpass", "font.family": "sans-serif"}):
        figure = Figure(figsize=(max(width, 6.0), height + 0.75), facecolor="white")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        middle, low = _centre(places, sizes), _bottom(places, sizes)
        half = max(width, 6.0) / 2
        axes.set(xlim=(middle - half, middle + half), ylim=(low - 0.2, low + height + 0.55))
        axes.axis("off")
        axes.text(
            middle - half + 0.2, low + height + 0.32, title, fontsize=10, weight="bold", va="center", color="#333333"
        )
        for edge, points in _routes(graph, places, sizes).items():
            _draw_edge(axes, graph, edge, points)
        for node in graph:
            _draw_box(axes, graph.nodes[node]["box"], places[node], sizes[node])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def layout(graph: nx.DiGraph[Any]) -> tuple[dict[Any, tuple[float, float]], dict[Any, tuple[float, float]]]:
    """Centres and sizes of the boxes, in inches, top to bottom; (from, to, layer) where an edge passes a layer."""
    layers = _layers(graph)
    wired = _with_joints(graph, layers)
    rows = _rows(wired)
    sizes = {node: _size(graph.nodes[node]["box"]) if node in graph else (JOINT, 0.0) for node in wired}
    across = _order(wired, rows, sizes)
    down, y = {}, 0.0
    for layer in sorted(rows):
        tall = max(sizes[node][1] for node in rows[layer])
        sizes.update((node, (JOINT, tall)) for node in rows[layer] if node not in graph)
        down[layer] = y - tall / 2
        y -= tall + GAP_Y
    return {node: (across[node], down[wired.nodes[node]["layer"]]) for node in wired}, sizes


def _layers(graph: nx.DiGraph[Any]) -> dict[Any, int]:
    """Longest path from the top; boxes without inputs move down to just above their first reader."""
    layers = {node: at for at, generation in enumerate(nx.topological_generations(graph)) for node in generation}
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            layers[node] = min(layers[reader] for reader in graph.successors(node)) - 1
    return layers


def _with_joints(graph: nx.DiGraph[Any], layers: dict[Any, int]) -> nx.DiGraph[Any]:
    """The graph with an invisible joint on every layer that an edge passes through."""
    wired: nx.DiGraph[Any] = nx.DiGraph()
    wired.add_nodes_from((node, {"layer": layer}) for node, layer in layers.items())
    for tail, head in graph.edges:
        between = [(tail, head, layer) for layer in range(layers[tail] + 1, layers[head])]
        wired.add_nodes_from((joint, {"layer": joint[2]}) for joint in between)
        nx.add_path(wired, [tail, *between, head])
    return wired


def _rows(wired: nx.DiGraph[Any]) -> dict[int, list[Any]]:
    rows: dict[int, list[Any]] = defaultdict(list)
    for node, facts in wired.nodes(data=True):
        rows[facts["layer"]].append(node)
    return rows


def _order(
    wired: nx.DiGraph[Any], rows: dict[int, list[Any]], sizes: dict[Any, tuple[float, float]]
) -> dict[Any, float]:
    """Horizontal centres: rows sorted by the mean of their neighbours, above and below in turn, then spread."""
    x: dict[Any, float] = {}
    for row in rows.values():
        x.update(_spread({node: float(at) for at, node in enumerate(row)}, row, sizes))
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer in sorted(rows, reverse=not down):
            wanted = {
                node: _wish(wired, node, x, down or sweep > SWEEPS - 3, not down or sweep > SWEEPS - 3)
                for node in rows[layer]
            }
            rows[layer].sort(key=lambda node: wanted[node])
            x.update(_spread(wanted, rows[layer], sizes))
    return x


def _wish(wired: nx.DiGraph[Any], node: Any, x: dict[Any, float], up: bool, down: bool) -> float:
    near = (list(wired.predecessors(node)) if up else []) + (list(wired.successors(node)) if down else [])
    return fmean(x[n] for n in near) if near else x[node]


def _spread(wanted: dict[Any, float], row: list[Any], sizes: dict[Any, tuple[float, float]]) -> dict[Any, float]:
    """Places as wished, pushed apart until no two boxes touch, the row's mean kept."""
    placed: dict[Any, float] = {}
    edge = float("-inf")
    for node in row:
        half = sizes[node][0] / 2
        placed[node] = max(wanted[node], edge + half)
        edge = placed[node] + half + GAP_X
    shift = fmean(wanted[node] - placed[node] for node in row)
    return {node: at + shift for node, at in placed.items()}


def _size(box: Any) -> tuple[float, float]:
    width = max(len(box.title) * WIDE, len(box.detail) * NARROW, 0.7) + 0.3
    return width, (2 if box.detail else 1) * LINE + 0.2


def _draw_box(axes: Any, box: Any, place: tuple[float, float], size: tuple[float, float]) -> None:
    from matplotlib.patches import FancyBboxPatch

    (x, y), (width, height), (fill, border) = place, size, COLOURS[box.kind]
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.08",
        fc=fill,
        ec=border,
        lw=1.1,
        zorder=2,
    )
    axes.add_patch(shape)
    ink = "white" if box.kind == "kvpass" else "#222222"
    weight = "bold" if box.kind in ("kvpass", "core") else "normal"
    offset = LINE / 2 if box.detail else 0.0
    axes.text(x, y + offset, box.title, ha="center", va="center", fontsize=9, color=ink, weight=weight, zorder=3)
    if box.detail:
        faint = "#ffe9e6" if box.kind == "kvpass" else "#666666"
        axes.text(x, y - offset, box.detail, ha="center", va="center", fontsize=7.5, color=faint, zorder=3)


def _routes(
    graph: nx.DiGraph[Any], places: dict[Any, Any], sizes: dict[Any, Any]
) -> dict[tuple[Any, Any], list[tuple[float, float]]]:
    """Points of every edge. Edges of one box leave and arrive side by side, in the order in which they come."""
    joints: dict[Any, list[Any]] = defaultdict(list)
    for node in sorted((n for n in places if n not in graph), key=lambda n: n[2]):
        joints[node[:2]].append(node)
    routes = {}
    for tail, head in graph.edges:
        inner = [
            (x, y + end * sizes[n][1] / 2) for n in joints[tail, head] for (x, y) in [places[n]] for end in (1, -1)
        ]
        routes[tail, head] = inner
    leave = {e: _port(e, 0, list(graph.out_edges(e[0])), routes, places, sizes) for e in graph.edges}
    arrive = {e: _port(e, 1, list(graph.in_edges(e[1])), routes, places, sizes) for e in graph.edges}
    return {e: [leave[e], *routes[e], arrive[e]] for e in graph.edges}


def _port(edge: Any, end: int, rivals: list[Any], routes: Any, places: Any, sizes: Any) -> tuple[float, float]:
    """Where an edge leaves (end 0) or enters (end 1) its box, beside the other edges of that side."""
    node = edge[end]
    other = {e: (routes[e][-end][0] if routes[e] else places[e[1 - end]][0]) for e in rivals}
    at = sorted(rivals, key=lambda e: (other[e], str(e))).index(edge)
    share = (at + 1) / (len(rivals) + 1) - 0.5
    (x, y), (width, height) = places[node], sizes[node]
    return x + share * width * 0.8, y - height / 2 if end == 0 else y + height / 2 + 0.02


def _draw_edge(axes: Any, graph: nx.DiGraph[Any], edge: tuple[Any, Any], points: list[tuple[float, float]]) -> None:
    from matplotlib.patches import FancyArrowPatch

    colour = (
        "#d93a2b" if "kvpass" in (graph.nodes[edge[0]]["box"].kind, graph.nodes[edge[1]]["box"].kind) else "#8c8c84"
    )
    arrow = FancyArrowPatch(path=_curve(points), arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.1, zorder=1)
    axes.add_patch(arrow)
    label = graph.edges[edge].get("label")
    if label:
        (x0, y0), (x1, y1) = points[0], points[1]
        style = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"}
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        axes.text(*middle, label, ha="center", va="center", fontsize=7, color="#9c2117", bbox=style, zorder=1.5)


def _curve(points: list[tuple[float, float]]) -> Any:
    """A smooth path through the points, vertical at each of them."""
    from matplotlib.path import Path

    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = (y0 - y1) * (0.5 if x0 != x1 else 0.3)
        vertices += [(x0, y0 - bend), (x1, y1 + bend), (x1, y1)]
        codes += [Path.CURVE4] * 3
    return Path(vertices, codes)


def _extent(places: dict[Any, Any], sizes: dict[Any, Any]) -> tuple[float, float]:
    left = min(places[n][0] - sizes[n][0] / 2 for n in places)
    right = max(places[n][0] + sizes[n][0] / 2 for n in places)
    return right - left + 0.4, max(places[n][1] + sizes[n][1] / 2 for n in places) - _bottom(places, sizes)


def _centre(places: dict[Any, Any], sizes: dict[Any, Any]) -> float:
    left = min(places[n][0] - sizes[n][0] / 2 for n in places)
    return float(left + max(places[n][0] + sizes[n][0] / 2 for n in places)) / 2


def _bottom(places: dict[Any, Any], sizes: dict[Any, Any]) -> float:
    return float(min(places[n][1] - sizes[n][1] / 2 for n in places))
