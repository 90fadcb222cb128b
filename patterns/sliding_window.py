"""Recognised and left dense: a layer that itself keeps only its last tokens (HF DynamicSlidingWindowLayer).

The attention reads `cat([past, new])`, the cache takes `cat[:, :, -window:]`. It is bounded already.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import whole
from kvpass.graph.shapes import normal_dim, shape_of


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
                if user in flow.outputs and _keeps_the_end(user, axis):
                    raise Miss(Reason.SLIDING_WINDOW, user, f"the cache takes only the end of {node.name}")


def _keeps_the_end(node: fx.Node, axis: int) -> bool:
    if call_name(node) == "slice":
        dim = normal_dim(argument(node, 1, "dim", 0), len(shape_of(operand(node))))
        return dim == axis and _negative(argument(node, 2, "start"))
    if call_name(node) != "getitem":
        return False
    index: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in index:
        index = (slice(None),) * (len(shape_of(operand(node))) - len(index) + 1) + index[index.index(Ellipsis) + 1 :]
    cut = [at for at, item in enumerate(index) if item != slice(None, None, None)]
    if cut != [axis] or not isinstance(index[axis], slice):
        return False
    return _negative(index[axis].start) and index[axis].stop is None


def _negative(start: Any) -> bool:
    return isinstance(start, int) and start < 0
