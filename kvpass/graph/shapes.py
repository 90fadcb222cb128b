"""Shape questions over fake tensors that never add a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes (ints and SymInts) of a node's tensor; () if it has none."""
    value = example(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def same(a: Any, b: Any) -> bool:
    """Statically known equal; unknown counts as different. Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def is_one(a: Any) -> bool:
    return isinstance(a, int) and a == 1


def is_empty(shape: Sequence[Any]) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape)


def normal_dim(dim: Any, ndim: int) -> int:
    return int(dim + ndim if dim < 0 else dim)


def quotient(a: Any, b: Any) -> Any:
    """a / b for sizes that divide, an int where it is one in every call."""
    result = a // b
    expr = getattr(getattr(result, "node", None), "expr", None)
    return int(expr) if expr is not None and expr.is_Integer else result
