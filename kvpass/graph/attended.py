"""Pieces of attention in forms that no pattern knows: does one of them attend over the length of a cache?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from kvpass.graph.calls import argument, call_name
from kvpass.graph.dataflow import Flow
from kvpass.graph.shapes import same, shape_of

PARTS = frozenset({"flex_attention", "sdpa", "sdpa_aten"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "softmax"})


def attended_by(flow: Flow, cache: fx.Node, axis: int, new: Iterable[fx.Node]) -> fx.Node | None:
    """The piece of attention below `cache` with as many keys as the cache is long and as many queries as are new: an
    attention op, or what makes or reads a matrix of weights `[.., queries, keys]`.
    """
    length = shape_of(cache)[axis]
    added = [shape_of(node)[axis] for node in new if len(shape_of(node)) > axis]
    for part in flow.below(cache, PARTS | PRODUCTS):
        for queries, keys in _sizes(part):
            if same(keys, length) and any(same(queries, size) for size in added):
                return part
    return None


def _sizes(part: fx.Node) -> list[tuple[Any, Any]]:
    """Numbers of queries and keys that a piece of attention may have."""
    if call_name(part) in PRODUCTS:
        shapes = [shape_of(node) for node in (part, *part.all_input_nodes)]
        return [(sizes[-2], sizes[-1]) for sizes in shapes if len(sizes) > 2]
    q, k = (shape_of(argument(part, at, name)) for at, name in enumerate(("query", "key")))
    return [(q[-2], k[-2])] if len(q) > 2 and len(k) > 2 else []
