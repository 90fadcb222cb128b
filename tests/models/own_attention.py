"""An attention of one's own, and the pattern that teaches kvpass what it is (docs/patterns.md shows this file)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kvpass.patterns import DEFAULT, Core, Miss, Reason, argument, call_name, check_operands, mask_terms, shape_of
from torch import Tensor, fx


@torch.library.custom_op("mylib::attend", mutates_args=())
def mylib_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, enable_gqa=True).clone()


@mylib_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@dataclass(frozen=True)  # equal instances: models compiled with equal patterns share their graphs
class MyAttention:
    """`mylib::attend(q, k, v, mask, drop)`: operands as in SDPA; an additive mask, a boolean one, or none."""

    name = "mylib"
    anchors = frozenset({"attend"})  # for near misses: the calls that match looks at

    def match(self, node: fx.Node) -> Core | None:
        if call_name(node) != "attend":
            return None
        q, k, v, mask, drop = (argument(node, at, name) for at, name in enumerate(("q", "k", "v", "mask", "drop")))
        if drop:
            raise Miss(Reason.DROPOUT, node, f"drop={drop}", reads=(k, v))
        check_operands(node, q, k, v)
        scale = 1.0 / math.sqrt(shape_of(q)[-1])
        return Core(node, q, k, v, terms=mask_terms(mask), scale=scale, causal=False, pattern=self.name)


PATTERNS = DEFAULT.extended(cores=[MyAttention()])
