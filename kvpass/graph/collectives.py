"""What ranks tell each other inside of a graph."""

from __future__ import annotations

from torch import fx

from kvpass.graph.calls import example

SPACES = ("_c10d_functional", "c10d_functional", "c10d")
"""Namespaces of torch's collectives."""


def exchanges(graph: fx.Graph) -> bool:
    """Whether ranks exchange something in a graph, or hold parts of a tensor."""
    return any(_exchanges(node) for node in graph.nodes)


def _exchanges(node: fx.Node) -> bool:
    space = getattr(node.target, "namespace", "") or str(getattr(node.target, "_qualified_op_name", "")).split("::")[0]
    if node.op == "call_function" and space in SPACES:
        return True
    module = str(getattr(node.target, "__module__", ""))
    return module.startswith("torch.distributed.") or hasattr(example(node), "placements")
