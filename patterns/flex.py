"""Recognised and refused: `torch.nn.attention.flex_attention`, a higher-order op whose masks and scores are functions.

Its keys and values are tensors like any other's, but `score_mod` and `mask_mod` are graphs of their own over positions
in the whole cache; slots in another order would need them rewritten.
"""

from __future__ import annotations

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name
from kvpass.graph.miss import Miss
from kvpass.sites.site import Core


class FlexAttention:
    name = "flex_attention"
    refuses_all = True

    def match(self, node: fx.Node) -> Core | None:
        """None, where it is no such op.

        Raises:
            Miss: FLEX_ATTENTION.
        """
        if call_name(node) != "flex_attention":
            return None
        reads = argument(node, 1, "key"), argument(node, 2, "value")
        raise Miss(Reason.FLEX_ATTENTION, node, "scores and masks of flex_attention are functions of positions", reads)
