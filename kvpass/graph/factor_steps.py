"""What each view does to the axes of a tensor, as factors. Raises Unknown for what is not followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from kvpass.graph.calls import argument
from kvpass.graph.factors import Axis, Factor, Factors, Unknown
from kvpass.graph.indices import END, index_of
from kvpass.graph.shapes import is_one, normal_dim, same


def _permute(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    dims = argument(node, 1, "dims")
    order = list(dims) if isinstance(dims, (tuple, list)) else list(node.args[1:])
    f.axes = [f.axes[normal_dim(d, len(f.axes))] for d in order]


def _transpose(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    a, b = (normal_dim(argument(node, at, name), len(f.axes)) for at, name in ((1, "dim0"), (2, "dim1")))
    f.axes[a], f.axes[b] = f.axes[b], f.axes[a]


def _transposed(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes[-2], f.axes[-1] = f.axes[-1], f.axes[-2]


def _movedim(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    a, b = (argument(node, at, name) for at, name in ((1, "source"), (2, "destination")))
    if not isinstance(a, int) or not isinstance(b, int):
        raise Unknown
    f.axes.insert(normal_dim(b, len(f.axes)), f.axes.pop(normal_dim(a, len(f.axes))))


def _unsqueeze(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes.insert(normal_dim(argument(node, 1, "dim"), len(f.axes) + 1), ())


def _squeeze(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    dim = argument(node, 1, "dim")
    if not isinstance(dim, int):
        raise Unknown
    dim = normal_dim(dim, len(f.axes))
    if is_one(before[dim]):
        del f.axes[dim]


def _getitem(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    index = index_of(node)
    named = sum(1 for item in index if item is not None and item is not Ellipsis)
    at = 0
    for item in index:
        if item is None:
            f.axes.insert(at, ())
            at += 1
        elif item is Ellipsis:
            at += len(before) - named
        elif isinstance(item, slice):
            _sliced(f, at, item, after[at] if at < len(after) else None)
            at += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            f.drop(at, item)
        else:
            raise Unknown


def _sliced(f: Factors, axis: int, item: slice, size: Any) -> None:
    start = item.start or 0
    if item.step not in (None, 1):
        raise Unknown
    whole = math.prod((x.size for x in f.axes[axis]), start=1)
    if start == 0 and (item.stop is None or (not isinstance(item.stop, int) and same(size, whole))):
        return
    if not isinstance(start, int) or not isinstance(size, int) or not isinstance(whole, int):
        raise Unknown
    if start <= -whole or (isinstance(item.stop, int) and item.stop > whole):
        raise Unknown  # a window, which covers its axis only while that is short
    f.cut(axis, start + whole if start < 0 else start, size)


def _narrow(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    axis, start = normal_dim(argument(node, 1, "dim"), len(before)), argument(node, 2, "start")
    if same(before[axis], after[axis]):
        return
    if not isinstance(start, int) or not isinstance(after[axis], int):
        raise Unknown
    f.cut(axis, start, after[axis])


def _select(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.drop(normal_dim(argument(node, 1, "dim"), len(before)), argument(node, 2, "index"))


def _slice(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    axis = normal_dim(argument(node, 1, "dim", 0), len(before))
    start = argument(node, 2, "start", 0)
    end = argument(node, 3, "end")
    end = None if end == END else end
    _sliced(f, axis, slice(start, end, argument(node, 4, "step", 1)), after[axis])


def _expand(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes = [()] * (len(after) - len(before)) + f.axes
    for at, (old, new) in enumerate(zip([1] * (len(after) - len(before)) + list(before), after, strict=True)):
        if is_one(old) and not is_one(new):
            f.axes[at] = (*f.axes[at], Factor(None, new))


def _repeat_interleave(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    dim, times = argument(node, 2, "dim"), argument(node, 1, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        raise Unknown
    f.axes[normal_dim(dim, len(f.axes))] += (Factor(None, times),)


def _repeat(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes = [()] * (len(after) - len(before)) + f.axes
    for at, (old, new) in enumerate(zip([1] * (len(after) - len(before)) + list(before), after, strict=True)):
        if not same(old, new):
            if not isinstance(old, int) or not isinstance(new, int):
                raise Unknown
            copies = (Factor(None, new // old),)
            f.axes[at] = (*f.axes[at], *copies) if is_one(old) else (*copies, *f.axes[at])


def _reshape(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Axes by groups of equal product: each is joined, then split."""
    axes, result, at, to = f.axes, list[Axis](), 0, 0
    while to < len(after):
        if at < len(before) and same(before[at], after[to]):
            result.append(axes[at])
            at, to = at + 1, to + 1
        elif is_one(after[to]):
            result.append(())
            to += 1
        elif at < len(before) and is_one(before[at]):
            at += 1
        else:
            taken, made = _group(before[at:], after[to:])
            parts = tuple(x for axis in axes[at : at + taken] for x in axis)
            result += f.split(parts, after[to : to + made])
            at, to = at + taken, to + made
    if not all(is_one(size) for size in before[at:]):
        raise Unknown
    f.axes = result


def _group(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int]:
    """How many of the first axes on both sides have the same product."""
    for taken in range(1, len(before) + 1):
        for made in range(1, len(after) + 1):
            if same(math.prod(before[:taken]), math.prod(after[:made])):
                return taken, made
    raise Unknown


def _joined(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    """`cat` with a memory in front, along the axis of tokens, which is longer from here on."""
    f.lengthen(normal_dim(argument(node, 1, "dim", 0), len(before)), after)


def _same(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    pass


STEPS: dict[str, Callable[[Factors, fx.Node, Sequence[Any], Sequence[Any]], None]] = {
    "transpose": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "moveaxis": _movedim,
    "getitem": _getitem,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "reshape": _reshape,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "getattr": _transposed,
    "narrow": _narrow,
    "select": _select,
    "slice": _slice,
    "cat": _joined,
    **dict.fromkeys(("contiguous", "clone", "to", "type_as", "float"), _same),
}
