"""View chains between a cached tensor and the attention that reads it, followed by axis letters.

Each axis of a tensor is a tuple of letters: `("H", "G")` is the KV-head axis with the group folded in behind it, so
    query head h reads KV head
h // G; `("G", "H")` would be the tiled order. An axis of size one made by unsqueeze is the empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.errors import Reason
from kvpass.match.calls import argument, call_name, example, operand
from kvpass.match.miss import Miss
from kvpass.match.shapes import is_one, normal_dim, same, shape_of
from kvpass.terms import Layout

Axis = tuple[str, ...]

_ATTENDED: tuple[list[Axis], ...] = (
    [("B",), ("H",), ("T",), ("D",)],
    [("B",), ("H", "G"), ("T",), ("D",)],
    [("B",), (), ("T",), ("D",)],
    [("B",), ("G",), ("T",), ("D",)],
)
"""What an attention may read: KV heads or query heads in place two; the last two for a single KV head."""


def walk_up(node: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Follow views upwards from `node` to the first node that `stop`s or is no view. Returns it and the views below
    it, top first.
    """
    chain: list[fx.Node] = []
    while not stop(node) and is_view(node):
        chain.append(node)
        node = operand(node)
    return node, tuple(reversed(chain))


def read_layout(base: fx.Node, chain: Sequence[fx.Node], axis: int | None = None) -> Layout:
    """Axis order of `base` if the chain turns it into `[B, Hq or Hkv, T, D]` with grouped heads in the right order.

    Args:
        axis: the axis along which the cache grows, if known; it decides where sizes of one leave the order open.

    Raises:
        Miss: LAYOUT or GROUP_ORDER, with the view that breaks it.
    """
    sizes = shape_of(base)
    if len(sizes) != 4:
        raise Miss(Reason.LAYOUT, base, f"a cached tensor of shape {sizes} is not 4-d")
    fitting, tiled = [], None
    for layout in Layout:
        axes = forward([(letter,) for letter in layout.value], base, chain)
        if axes is not None and is_one(sizes[layout.head_axis]):
            axes = [tuple(letter for letter in names if letter != "H") for names in axes]  # one head: any place will do
        if axes in _ATTENDED:
            fitting.append(layout)
        if axes == [("B",), ("G", "H"), ("T",), ("D",)]:
            tiled = chain[-1]
    if fitting:
        return next((layout for layout in fitting if layout.token_axis == axis), fitting[0])
    if tiled is not None:
        raise Miss(Reason.GROUP_ORDER, tiled, "KV heads are tiled (repeat), not interleaved")
    raise Miss(
        Reason.LAYOUT, chain[-1] if chain else base, "views between cache and attention do not end in [B, H, T, D]"
    )


def forward(axes: list[Axis], base: fx.Node, chain: Sequence[fx.Node]) -> list[Axis] | None:
    """Axes after the chain, None when a view does something unknown to them."""
    current: list[Axis] | None = list(axes)
    before = base
    for node in chain:
        if current is None:
            return None
        current = _FORWARD[call_name(node)](current, node, shape_of(before), shape_of(node))
        before = node
    return current


def is_view(node: fx.Node) -> bool:
    """True for calls that only rearrange or repeat one tensor: same dtype, and `getitem` only of everything."""
    if call_name(node) not in _FORWARD or not isinstance(operand(node), fx.Node):
        return False
    before, after = example(operand(node)), example(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    return call_name(node) != "getitem" or _full_slices(node.args[1])


def _full_slices(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None, None, None) for item in items)


def _transpose(axes: list[Axis], node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> list[Axis] | None:
    a, b = (normal_dim(argument(node, at, name), len(axes)) for at, name in ((1, "dim0"), (2, "dim1")))
    axes[a], axes[b] = axes[b], axes[a]
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
}
