"""Update without an op: on the first call the new K and V are themselves returned as the cache (hand-written
decoders).
"""

from __future__ import annotations

from torch import fx

from kvpass.graph.dataflow import Flow
from kvpass.sites.site import Update
from kvpass.terms import CacheForm


class ReturnedUpdate:
    name = "returned"

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at a value that an attention reads and the graph returns."""
        if node not in flow.outputs or node.op == "placeholder":
            return None
        return Update(node=node, new=node, past=None, axis=None, form=CacheForm.RETURNED, pattern=self.name)
