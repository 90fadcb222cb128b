"""The drawing in docs/architecture.md, from the imports of the code: `make api` writes it, tests compare it.

python -P tests/support/rooms_page.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- made by tests/support/rooms_page.py -->\n", "<!-- end -->\n"


def module_of(file: Path) -> str:
    """`kvpass/graph/calls.py` is kvpass.graph.calls, `kernels/rule.py` is kvpass.kernels.rule."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "kvpass" else ("kvpass", *parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    """`graph`, `kernels`, `patterns`; a file in no room is one of its own."""
    return [*module.split("."), "__init__"][1]


def rooms() -> nx.DiGraph:
    """Which room imports which. Attributes of a room: `files`, `lines`, `about` (its first line)."""
    found = nx.DiGraph()
    for top in ("kvpass", "kernels", "patterns"):
        for file in sorted((ROOT / top).rglob("*.py")):
            room, tree = room_of(module_of(file)), ast.parse(file.read_text())
            if "files" not in found.nodes.get(room, {}):
                found.add_node(room, files=0, lines=0, about="")
            found.nodes[room]["files"] += 1
            found.nodes[room]["lines"] += len(file.read_text().splitlines())
            if file.stem == "__init__" and module_of(file).count(".") == 1:
                found.nodes[room]["about"] = (ast.get_docstring(tree) or "").split("\n")[0]
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvpass."):
                    other = room_of(node.module or "")
                    if other != room:
                        found.add_edge(room, other)
    return found


def drawing() -> str:
    """A table of rooms, from the doors down, and their arrows as a Mermaid flowchart, without those that others imply
    and without the words that all share.
    """
    graph = rooms()
    graph.remove_nodes_from([n for n in ("__init__", "__main__", "errors", "terms") if n in graph])
    order = list(nx.lexicographical_topological_sort(graph))
    arrows = nx.transitive_reduction(graph)
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"  {a} --> {b}" for a in order for b in order if arrows.has_edge(a, b)]
    lines += ["```", "", "| room | files | lines | what it is |", "| --- | --- | --- | --- |"]
    for room in order:
        of = graph.nodes[room]
        folder = room if room in ("kernels", "patterns") else f"kvpass/{room}"
        lines.append(f"| `{folder}` | {of['files']} | {of['lines']} | {of['about']} |")
    return "\n".join(lines) + "\n"


def with_drawing(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_drawing(PAGE.read_text()))
    print(f"wrote the drawing in {PAGE.relative_to(ROOT)}")
