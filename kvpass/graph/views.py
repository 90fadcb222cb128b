"""View chains between a cached tensor and the attention that reads it, followed by axis letters.

Each axis of a tensor is a tuple of letters: `("H", "G")` is the KV-head axis with the group folded in behind it, so
    query head h reads KV head
h // G; `("G", "H")` is the tiled order. An axis of size one made by unsqueeze is the empty tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.factors import APART
from kvpass.graph.numbers import factor_of
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of

Axis = tuple[str, ...]

_ROLES: dict[str, tuple[Axis, ...]] = {
    "B": (("B",),),
    "T": (("T",),),
    "D": (("D",),),
    "H": (("H",), ("H", "G"), ("G",), ()),
    "G": ((), ("G",)),
    "N": (("B", "H"), ("B", "H", "G"), ("B", "G"), ("B",)),
}
"""Which letters an attention may find on each axis of its keys: KV heads or query heads in place of `H`, without `H`
for a single KV head."""


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


def lands(base: fx.Node, chain: Sequence[fx.Node], roles: str) -> bool:
    """Does a chain turn `[B, H, T, D]` into the axes that an attention reads?"""
    axes = forward([("B",), ("H",), ("T",), ("D",)], base, chain)
    return axes is not None and _fits(axes, roles)


def _fits(axes: Sequence[Axis], roles: str) -> bool:
    if len(axes) != len(roles) or sum("G" in names for names in axes) > 1:
        return False
    return all(names in _ROLES[role] for names, role in zip(axes, roles, strict=True))


def forward(axes: list[Axis], base: fx.Node, chain: Sequence[fx.Node]) -> list[Axis] | None:
    """Axes after the chain, None when a view does something unknown to them."""
    current: list[Axis] | None = list(axes)
    before = base
    for node in chain:
        if current is None:
            return None
        if factor_of(node) is None:
            current = _FORWARD[call_name(node)](current, node, shape_of(before), shape_of(node))
        before = node
    return current


def is_view(node: fx.Node) -> bool:
    """True for calls that only rearrange or repeat one tensor: same dtype, and `getitem` only of everything."""
    if call_name(node) not in _FORWARD or not isinstance(operand(node), fx.Node):
        return False
    before, after = example(operand(node)), example(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype and not widens(before.dtype, after.dtype):
        return False
    if call_name(node) == "reshape" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return False  # the same bits as other numbers
    if call_name(node) == "getattr":
        return node.args[1] in ("mT", "T") and (node.args[1] == "mT" or before.dim() == 2)
    if call_name(node) == "slice":
        return all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True))
    return call_name(node) != "getitem" or _full_slices(node.args[1])


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


def _transpose(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    a, b = (normal_dim(argument(node, at, name), len(axes)) for at, name in ((1, "dim0"), (2, "dim1")))
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def _transposed(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    axes[-2], axes[-1] = axes[-1], axes[-2]
    return axes


def _permute(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    dims = argument(node, 1, "dims")
    order = list(dims) if isinstance(dims, (tuple, list)) else list(node.args[1:])
    return [axes[normal_dim(d, len(axes))] for d in order]


def _getitem(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    named = sum(1 for item in index if item is not None and item is not Ellipsis)
    result: list[Axis] = []
    rest = list(axes)
    for item in index:
        if item is None:
            result.append(())
        elif item is Ellipsis:
            take = len(axes) - named
            result += rest[:take]
            rest = rest[take:]
        else:
            result.append(rest.pop(0))
    return result + rest


def _unsqueeze(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    axes.insert(normal_dim(argument(node, 1, "dim"), len(axes) + 1), ())
    return axes


def _squeeze(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    dim = argument(node, 1, "dim")
    if not isinstance(dim, int) or axes[normal_dim(dim, len(axes))] != ():
        return None
    del axes[normal_dim(dim, len(axes))]
    return axes


def _expand(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    if len(before) != len(after):
        return None
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        if is_one(old) and not is_one(new):
            if axes[at] not in ((), ("H",)):
                return None
            axes[at] = (*axes[at], "G")
    return axes


def _reshape(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    """Merge neighbouring axes whose sizes multiply to the new size; splitting an axis is not followed."""
    result: list[Axis] = []
    at = 0
    for size in after:
        if at < len(before) and same(before[at], size):
            result.append(axes[at])
            at += 1
            continue
        if is_one(size):
            result.append(())
            continue
        product = 1
        merged: Axis = ()
        while at < len(before) and isinstance(before[at], int) and (product == 1 or not same(product, size)):
            product, merged = product * before[at], merged + axes[at]
            at += 1
        if not same(product, size):
            return None
        result.append(merged)
    return result if all(is_one(size) for size in before[at:]) else None


def _repeat_interleave(
    axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]
) -> list[Axis] | None:
    dim = argument(node, 2, "dim")
    if not isinstance(dim, int) or not isinstance(argument(node, 1, "repeats"), int):
        return None
    axes[normal_dim(dim, len(axes))] += ("G",)
    return axes


def _repeat(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    if len(before) != len(after):
        return None
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        if not same(old, new):
            axes[at] = (*axes[at], "G") if is_one(old) else ("G", *axes[at])
    return axes


def _same_axes(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    return axes


_FORWARD: dict[str, Callable[[list[Axis], fx.Node, Sequence[Any], Sequence[Any]], list[Axis] | None]] = {
    "transpose": _transpose,
    "permute": _permute,
    "getitem": _getitem,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "reshape": _reshape,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "contiguous": _same_axes,
    "clone": _same_axes,
    "to": _same_axes,
    "type_as": _same_axes,
    "float": _same_axes,
    "getattr": _transposed,
    "slice": _same_axes,
}
