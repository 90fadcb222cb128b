"""Core: `F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)`, with every
keyword.

Refuses: dropout above zero, a scale that is no constant, operands that are not 4-d, dtypes other than float32,
bfloat16, float16.
"""

from __future__ import annotations

import math

import torch
from kvpass.patterns.chosen import split_choices
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, example
from kvpass.graph.miss import Miss
from kvpass.graph.numbers import constant
from kvpass.graph.shapes import shape_of
from kvpass.sites.site import Axes, Core, Term
from kvpass.terms import MaskKind

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class SdpaCore:
    name = "sdpa"
    anchors = frozenset({"sdpa"})

    def match(self, node: fx.Node) -> Core | None:
        """The core at an SDPA call, in normal form.

        Raises:
            Miss: UNSUPPORTED_ATTENTION, DROPOUT, LAYOUT, DTYPE or MASK_UNKNOWN.
        """
        if call_name(node) != "sdpa":
            return None
        q, k, v = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
        self._check(node, q, k, v)
        scale = constant(argument(node, 6, "scale"))
        return Core(
            node=node,
            q=q,
            k=k,
            v=v,
            terms=mask_terms(argument(node, 3, "attn_mask"), "NST" if len(shape_of(q)) == 3 else "BHST"),
            scale=float(scale) if scale is not None else 1.0 / math.sqrt(shape_of(q)[-1]),
            causal=bool(argument(node, 5, "is_causal", False)),
            pattern=self.name,
            axes=Axes("NSD", "NTD", "NTD", "NSD") if len(shape_of(q)) == 3 else Axes(),
        )

    def _check(self, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
        for at, name in ((5, "is_causal"), (6, "scale")):
            if isinstance(constant(argument(node, at, name)), fx.Node):
                raise Miss(Reason.UNSUPPORTED_ATTENTION, node, f"{name} is computed, not a constant")
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            raise Miss(Reason.DROPOUT, node, f"dropout_p={argument(node, 4, 'dropout_p')}")
        check_operands(node, q, k, v)


def check_operands(node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
    """What every core asks of its operands: four axes, or three (sequences and heads in one), a constant head dimension, one floating dtype.

    Raises:
        Miss: LAYOUT or DTYPE.
    """
    for operand in (q, k, v):
        if len(shape_of(operand)) not in (3, 4) or len(shape_of(operand)) != len(shape_of(q)):
            raise Miss(Reason.LAYOUT, operand, f"operand of shape {shape_of(operand)} is not 4-d")
    if not all(isinstance(shape_of(operand)[-1], int) for operand in (q, v)):
        raise Miss(Reason.LAYOUT, node, "the head dimension is not a constant")
    dtypes = {example(operand).dtype for operand in (q, k, v)}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise Miss(Reason.DTYPE, node, f"q, k, v are {sorted(map(str, dtypes))}")


def mask_terms(mask: fx.Node | None, axes: str = "BHST") -> tuple[Term, ...]:
    """An SDPA's mask in normal form: none, one that is added, or a bool one in which True is kept."""
    if mask is None:
        return ()
    return split_choices((Term(mask, MaskKind.KEEP if example(mask).dtype == torch.bool else MaskKind.ADD, axes),))
