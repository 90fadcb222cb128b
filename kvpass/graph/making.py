"""A node of a graph in plainer words, with what hangs on nodes as Dynamo captures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from kvpass.graph.calls import example


def made(graph: fx.Graph, like: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    """A call where the graph inserts, of the model's line and module that `like` is of, with its fake value."""
    node = graph.call_function(function, args)
    node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
    fakes = (example(n) for n in node.all_input_nodes)
    with next(fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode")):
        node.meta["example_value"] = function(*fx.map_arg(args, example))
    return node
