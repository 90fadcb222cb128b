"""Core: the aten ops that F.scaled_dot_product_attention becomes when an exported program is decomposed:
`_scaled_dot_product_flash_attention_for_cpu`, `_flash_`, `_efficient_`, `_cudnn_`, `_fused_attention_overrideable`.

They return a tuple; the core is the `getitem` of its first part. Refuses what SDPA refuses, and a log-sum-exp that
anything reads.
"""

from __future__ import annotations

import math
from typing import Any

from kvpass.patterns.sdpa import check_operands, mask_terms
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, operand
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import shape_of
from kvpass.sites.site import Core


class AtenSdpaCore:
    name = "sdpa_aten"
    anchors = frozenset({"sdpa_aten"})

    def match(self, node: fx.Node) -> Core | None:
        """The core at the first part of such an op's result, in normal form.

        Raises:
            Miss: UNSUPPORTED_ATTENTION, DROPOUT, LAYOUT or DTYPE.
        """
        op = operand(node) if call_name(node) == "getitem" else None
        if not isinstance(op, fx.Node) or call_name(op) != "sdpa_aten" or node.args[1] != 0:
            return None
        given = arguments(op)
        q, k, v = (given[name] for name in ("query", "key", "value"))
        _check(op, given)
        check_operands(op, q, k, v)
        scale = given.get("scale")
        return Core(
            node=node,
            q=q,
            k=k,
            v=v,
            terms=mask_terms(given.get("attn_mask", given.get("attn_bias"))),
            scale=float(scale) if scale is not None else 1.0 / math.sqrt(shape_of(q)[-1]),
            causal=bool(given["is_causal"]),
            pattern=self.name,
            inner=(op,),
        )


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an aten op by the names of its schema."""
    schema = node.target._schema  # type: ignore[union-attr]  # an aten op
    return {a.name: argument(node, at, a.name, a.default_value) for at, a in enumerate(schema.arguments)}


def _check(node: fx.Node, given: dict[str, Any]) -> None:
    for name in ("is_causal", "scale"):
        if isinstance(given.get(name), fx.Node):
            raise Miss(Reason.UNSUPPORTED_ATTENTION, node, f"{name} is computed, not a constant")
    if given["dropout_p"] != 0.0:
        raise Miss(Reason.DROPOUT, node, f"dropout_p={given['dropout_p']}")
