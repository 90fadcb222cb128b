"""Recognised and left dense: a layer that itself keeps only its last tokens (HF DynamicSlidingWindowLayer).

The attention reads `cat([past, new])`, the cache takes `cat[:, :, -window:]`. It is bounded already.
"""

from __future__ import annotations

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import whole
from kvpass.graph.shapes import normal_dim, shape_of
from kvpass.graph.windows import keeps_the_end


class SlidingWindow:
    name = "sliding window"

    def match(self, base: fx.Node, flow: Flow) -> None:
        """Raises:
        Miss: SLIDING_WINDOW at the slice that is stored.
        """
        for node in whole(base):
            if call_name(node) != "cat":
                continue
            axis = normal_dim(argument(node, 1, "dim", 0), len(shape_of(node)))
            for user in node.users:
                if user in flow.outputs and keeps_the_end(user, axis):
                    raise Miss(Reason.SLIDING_WINDOW, user, f"the cache takes only the end of {node.name}")
