"""Are two values of a graph always the same? Equal expressions of the same values are, wherever they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.aliases import changed
from kvpass.graph.calls import call_name, changes, example
from kvpass.graph.dataflow import Flow

LIMIT = 60
"""Nodes that an index is computed from."""

_RANDOM = frozenset({"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
                     "multinomial", "normal", "dropout", "empty", "empty_like", "new_empty"})  # fmt: skip
"""Calls that give something else each time."""


def equal(a: Any, b: Any, flow: Flow, left: int = LIMIT) -> bool:
    """The same node, equal numbers, or the same operation on values that are equal and not changed in between."""
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return left > 0 and (_same_number(a, b) or _same_call(a, b, flow, left - 1))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y, flow, left) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], flow, left) for key in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), flow, left)
    return _same_number(a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else type(a) is type(b) and a == b


def _same_number(a: Any, b: Any) -> bool:
    """Two sizes, or numbers made of sizes."""
    values = [example(x) if isinstance(x, fx.Node) else x for x in (a, b)]
    if not all(isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool) for x in values):
        return False
    exprs = [x.node.expr if isinstance(x, torch.SymInt) else x for x in values]
    return bool(exprs[0] == exprs[1])


def _same_call(a: fx.Node, b: fx.Node, flow: Flow, left: int) -> bool:
    if a.op != b.op or a.target != b.target or a.op not in ("call_function", "call_method", "get_attr"):
        return False
    if call_name(a) in _RANDOM or changes(a) or changes(b):
        return False
    if not equal(a.args, b.args, flow, left) or not equal(a.kwargs, b.kwargs, flow, left):
        return False
    first, last = sorted((flow.order[a], flow.order[b]))
    return all(changed(one, first, last, flow.order) is None for one in (*a.all_input_nodes, a, b))
