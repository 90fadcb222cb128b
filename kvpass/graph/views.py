"""View chains between a cached tensor and the attention that reads it. `kvpass.graph.factors` follows what they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.factors import APART
from kvpass.graph.numbers import factor_of
from kvpass.graph.shapes import same, shape_of

VIEWS = frozenset({
    "transpose", "permute", "getitem", "unsqueeze", "squeeze", "expand", "reshape", "repeat_interleave", "repeat",
    "contiguous", "clone", "to", "type_as", "float", "getattr", "slice",
})  # fmt: skip


def walk_up(node: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Follow views, and products with a number, upwards from `node` to the first node that `stop`s or is neither.
    Returns it and the views below it, top first.
    """
    chain: list[fx.Node] = []
    while not stop(node) and (is_view(node) or factor_of(node) is not None):
        chain.append(node)
        node = next(n for n in node.all_input_nodes if shape_of(n)) if factor_of(node) is not None else operand(node)
    return node, tuple(reversed(chain))


def walk_pieces(
    node: fx.Node, stop: Callable[[fx.Node], bool], fronts: bool = False
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """`walk_up` that also goes through constant pieces of a tensor: `chunk`, `split`, `unbind`, `select`, `narrow`,
    slices; and with `fronts` through those that only leave out an end. What they cut is for `kvpass.graph.layouts` to
    say.
    """
    chain: list[fx.Node] = []
    while not stop(node):
        passes = is_view(node) or factor_of(node) is not None or is_piece(node)
        if not passes and not (fronts and is_front(node)):
            break
        chain.append(node)
        node = next(n for n in node.all_input_nodes if shape_of(n)) if factor_of(node) is not None else operand(node)
        if call_name(node) in APART and not shape_of(node):
            chain.append(node)
            node = operand(node)
    return node, tuple(reversed(chain))


def is_piece(node: fx.Node) -> bool:
    """A part of a tensor whose place does not change from call to call."""
    name, above = call_name(node), operand(node)
    if not isinstance(above, fx.Node) or not isinstance(example(node), torch.Tensor):
        return False
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if call_name(above) in APART and not shape_of(above):
            return isinstance(node.args[1], int)
        return all(item is None or item is Ellipsis or _is_fixed(item) for item in index)
    if name in ("narrow", "select"):
        return isinstance(argument(node, 2, "start" if name == "narrow" else "index"), int)
    return name in ("movedim", "moveaxis", "slice")


def _is_fixed(item: Any) -> bool:
    parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    return all(part is None or (isinstance(part, int) and not isinstance(part, bool)) for part in parts)


def is_view(node: fx.Node) -> bool:
    """True for calls that only rearrange or repeat one tensor: same dtype, and `getitem` only of everything."""
    name, above = call_name(node), operand(node)
    if name not in VIEWS or not isinstance(above, fx.Node):
        return False
    before, after = example(above), example(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype and not widens(before.dtype, after.dtype):
        return False
    if name == "reshape" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return False  # the same bits as other numbers
    if name == "getattr":
        return node.args[1] in ("mT", "T") and (node.args[1] == "mT" or before.dim() == 2)
    if name == "slice":
        return all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True))
    return name != "getitem" or _full_slices(node.args[1])


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Does a cast keep every number? Among float16, bfloat16, float32 and float64, to more bits."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return before in floats and after in floats and after.itemsize > before.itemsize


def is_front(node: fx.Node) -> bool:
    """`x[:, :n]`, `x.narrow(1, 0, n)`: everything but the end along one axis, or along the first and another, and no
    more axes than before.
    """
    if not isinstance(operand(node), fx.Node) or is_view(node):
        return False
    name, at_start = call_name(node), True
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        cuts = [item for item in index if item is not Ellipsis and item != slice(None, None, None)]
        at_start = all(isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1) for item in cuts)
    elif name in ("narrow", "slice"):
        at_start = argument(node, 2, "start") in (None, 0) and argument(node, 4, "step", 1) == 1
    if (
        name not in ("getitem", "narrow", "slice")
        or not at_start
        or len(shape_of(operand(node))) != len(shape_of(node))
    ):
        return False
    changed = front_axes(node)
    return len(changed) <= 1 or (len(changed) == 2 and changed[0] == 0)


def front_axes(node: fx.Node) -> list[int]:
    """The axes along which a front is shorter, as far as is known."""
    before, after = shape_of(operand(node)), shape_of(node)
    return [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if not same(a, b)]


def chain_scale(chain: Sequence[fx.Node]) -> float:
    """The number that a chain multiplies its tensor by."""
    factors = map(factor_of, chain)
    return math.prod((factor for factor in factors if factor is not None), start=1.0)


def _full_slices(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None, None, None) for item in items)
