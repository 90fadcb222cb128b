"""Which outputs of a graph are caches that stay as they are by choice: windows, cross-attention, keys of an indexer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from kvpass.graph.dataflow import flat_outputs
from kvpass.graph.module_names import module_path
from kvpass.sites.table import Decline


def dense_by_choice(graph: fx.Graph, declined: Sequence[Decline]) -> tuple[int, ...]:
    """Places of outputs that are made in the modules of such caches."""
    homes = {d.site for d in declined if d.reason.by_choice}
    if not homes:
        return ()
    outputs = flat_outputs(next(iter(reversed(graph.nodes))))
    return tuple(
        at
        for at, node in enumerate(outputs)
        if isinstance(node, fx.Node) and (module_path(node) in homes or node.name in homes)
    )
