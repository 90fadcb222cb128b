"""Golden texts: compared with a file of tests/golden, rewritten with KVPASS_ACCEPT=1."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import fx

from kvpass.graph.calls import call_name

FOLDER = Path(__file__).parent.parent / "golden"


def check(name: str, text: str) -> None:
    """Fails if the text is not that of the golden file."""
    path, text = FOLDER / f"{name}.txt", normal(text)
    if os.environ.get("KVPASS_ACCEPT"):
        path.write_text(text)
    assert path.exists(), f"no {path}: run with KVPASS_ACCEPT=1"
    assert text == path.read_text(), f"differs from {path}: look at it, then run with KVPASS_ACCEPT=1"


def normal(text: str) -> str:
    """Without folders, line numbers and hashes."""
    text = re.sub(r"\S*/tests/(\S+?):\d+", r"\1", text)
    return re.sub(r"plan [0-9a-f]{12}", "plan <hash>", text).rstrip() + "\n"


def code(gm: fx.GraphModule, around: str, context: int = 2) -> str:
    """The graph from `context` nodes before the first node whose name or meta speaks of a site, to as many after it."""
    nodes = [n for n in gm.graph.nodes if n.op != "placeholder"]
    marked = [at for at, n in enumerate(nodes) if "kvpass" in n.meta or call_name(n) in around.split()]
    return "\n".join(map(line, nodes[max(0, min(marked) - context) : max(marked) + context + 1]))


def line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    args = [str(arg) for arg in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    return f"{node.name} = {target}({', '.join(args)})"
