"""Axes of a tensor followed through views as products of factors: what is split, cut, joined and repeated.

An axis is read row by row over its factors, the last one fastest. `view(b, t, 2, h, d)` splits the last axis of a
cached [B, T, 2 * H * D] into three factors, `[:, :, 0]` cuts the first of them to one number, `reshape` joins others.
So views of any kind are followed exactly, and what is left can be said of the cached tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.numbers import factor_of
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of


@dataclass(frozen=True, eq=False)
class Factor:
    """A part of an axis of the base.

    Attributes:
        root: the base's axis; None for copies (of `expand` and `repeat`).
        size: how many numbers it takes, from `start` on, of the `of` that it takes in the base.
    """

    root: int | None
    size: Any
    start: int = 0
    of: Any = None

    @property
    def whole(self) -> bool:
        return self.start == 0 and (self.size is self.of or same(self.size, self.of))


Axis = tuple[Factor, ...]
Passed = Callable[[Sequence[Axis], fx.Node], bool]


class _Unknown(Exception):
    """A view that is not followed."""


class Factors:
    """Axes of a tensor made from `base` by views.

    Attributes:
        roots: of each axis of the base, the factors that it is split into, in order; those that are cut away too.
        axes: of the tensor; an axis that a view has made anew is ().
    """

    def __init__(self, base: fx.Node) -> None:
        self.roots = [[Factor(at, size, 0, size)] for at, size in enumerate(shape_of(base))]
        self.axes: list[Axis] = [tuple(parts) for parts in self.roots]

    def follow(self, base: fx.Node, chain: Sequence[fx.Node], passed: Passed | None = None) -> fx.Node | None:
        """Take in a chain of views, top first. Returns the first view that is not followed; None if all are.

        passed: which views are taken for those of everything.
        """
        before = base
        for node in chain:
            if passed is not None and passed(self.axes, node):
                before = node
                continue
            if factor_of(node) is None and not isinstance(example(node), (tuple, list)):
                try:
                    if call_name(node) == "getitem" and isinstance(node.args[1], int) and _parts(node) is not None:
                        self._part(node)
                    else:
                        _STEPS[call_name(node)](self, node, shape_of(before), shape_of(node))
                except (_Unknown, KeyError):
                    return node
            if not isinstance(example(node), (tuple, list)):
                before = node
        return None

    def cut(self, axis: int, start: int, size: int) -> None:
        """Keep `size` numbers of an axis, from `start` on."""
        parts = self.axes[axis]
        whole = math.prod((f.size for f in parts), start=1)
        if start == 0 and same(size, whole):
            return
        if not parts or not all(isinstance(f.size, int) for f in parts):
            raise _Unknown
        first, inner = parts[0], math.prod((f.size for f in parts[1:]), start=1)
        if start % inner or size % inner:
            if len(parts) < 2 or start // inner != (start + size - 1) // inner:
                raise _Unknown
            self._replace(first, [Factor(first.root, 1, first.start + start // inner, first.of)], axis)
            self.axes[axis] = self.axes[axis][1:]  # one number of the outer factor, and some of the inner ones
            self.cut(axis, start % inner, size)
            return
        self._replace(first, [Factor(first.root, size // inner, first.start + start // inner, first.of)], axis)

    def drop(self, axis: int, at: int) -> None:
        """Keep one number of an axis, and not the axis."""
        whole = math.prod((f.size for f in self.axes[axis]), start=1)
        if not isinstance(at, int) or not isinstance(whole, int):
            raise _Unknown
        self.cut(axis, at % whole, 1)
        del self.axes[axis]

    def split(self, parts: Axis, sizes: Sequence[Any]) -> list[Axis]:
        """Factors, read row by row, as axes of these sizes."""
        left, found = list(parts), []
        for size in sizes:
            axis: list[Factor] = []
            need = size
            while not is_one(need):
                if not left:
                    raise _Unknown
                first = left.pop(0)
                if not same(first.size, need) and isinstance(first.size, int) and isinstance(need, int):
                    if first.size > need:
                        outer, inner = self._halved(first, need)
                        axis.append(outer)
                        left.insert(0, inner)
                        break
                    if first.size == 0 or need % first.size:
                        raise _Unknown
                    need //= first.size
                elif same(first.size, need):
                    need = 1
                else:
                    raise _Unknown
                axis.append(first)
            found.append(tuple(axis))
        if any(not is_one(f.size) for f in left):
            raise _Unknown
        return found

    def _halved(self, factor: Factor, outer: int) -> tuple[Factor, Factor]:
        if factor.root is None or factor.size % outer:
            raise _Unknown
        inner = factor.size // outer
        if factor.start % inner or factor.of % inner:
            raise _Unknown
        halves = (
            Factor(factor.root, outer, factor.start // inner, factor.of // inner),
            Factor(factor.root, inner, 0, inner),
        )
        self._replace(factor, list(halves))
        return halves

    def _replace(self, old: Factor, new: list[Factor], axis: int | None = None) -> None:
        """Put others in the place of a factor, among the base's and, if asked, in an axis."""
        if old.root is None:
            raise _Unknown
        parts = self.roots[old.root]
        at = parts.index(old)
        parts[at : at + 1] = new
        if axis is not None:
            self.axes[axis] = tuple(y for x in self.axes[axis] for y in (new if x is old else [x]))

    def _part(self, node: fx.Node) -> None:
        """One of the parts that `chunk`, `split` or `unbind` gives."""
        found = _parts(node)
        assert found is not None
        axis, start, size = found
        if size is None:
            self.drop(axis, start)
        else:
            self.cut(axis, start, size)


def _parts(node: fx.Node) -> tuple[int, int, int | None] | None:
    """Axis, start and size of the part that a node takes of a tensor taken apart; size None if the axis is gone."""
    apart, at = operand(node), node.args[1]
    name = call_name(apart) if isinstance(apart, fx.Node) else ""
    if name not in APART or not isinstance(at, int) or not isinstance(operand(apart), fx.Node):
        return None
    place = {"unbind": (1, "dim", 0), "chunk": (2, "dim", 0)}.get(name, (2, "dim", 0))
    axis = normal_dim(argument(apart, *place), len(shape_of(operand(apart))))
    tensors: Any = example(apart)
    at = at % len(tensors)
    if name == "unbind":
        return axis, at, None
    sizes = [t.shape[axis] for t in tensors]
    return (axis, sum(sizes[:at]), sizes[at]) if all(isinstance(s, int) for s in sizes) else None


APART = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
"""Calls that give a tensor in parts."""


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
        raise _Unknown
    f.axes.insert(normal_dim(b, len(f.axes)), f.axes.pop(normal_dim(a, len(f.axes))))


def _unsqueeze(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes.insert(normal_dim(argument(node, 1, "dim"), len(f.axes) + 1), ())


def _squeeze(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    dim = argument(node, 1, "dim")
    if not isinstance(dim, int):
        raise _Unknown
    dim = normal_dim(dim, len(f.axes))
    if is_one(before[dim]):
        del f.axes[dim]


def _getitem(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
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
            raise _Unknown


def _sliced(f: Factors, axis: int, item: slice, size: Any) -> None:
    start = item.start or 0
    if item.step not in (None, 1):
        raise _Unknown
    whole = math.prod((x.size for x in f.axes[axis]), start=1)
    if start == 0 and (item.stop is None or (not isinstance(item.stop, int) and same(size, whole))):
        return
    if not isinstance(start, int) or not isinstance(size, int) or not isinstance(whole, int):
        raise _Unknown
    if start <= -whole or (isinstance(item.stop, int) and item.stop > whole):
        raise _Unknown  # a window, which covers its axis only while that is short
    f.cut(axis, start + whole if start < 0 else start, size)


def _narrow(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    axis, start = normal_dim(argument(node, 1, "dim"), len(before)), argument(node, 2, "start")
    if same(before[axis], after[axis]):
        return
    if not isinstance(start, int) or not isinstance(after[axis], int):
        raise _Unknown
    f.cut(axis, start, after[axis])


def _select(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.drop(normal_dim(argument(node, 1, "dim"), len(before)), argument(node, 2, "index"))


_FAR = (1 << 63) - 1
"""The end of an aten slice without one."""


def _slice(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    axis = normal_dim(argument(node, 1, "dim", 0), len(before))
    start = argument(node, 2, "start", 0)
    end = argument(node, 3, "end")
    end = None if end == _FAR else end
    _sliced(f, axis, slice(start, end, argument(node, 4, "step", 1)), after[axis])


def _expand(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes = [()] * (len(after) - len(before)) + f.axes
    for at, (old, new) in enumerate(zip([1] * (len(after) - len(before)) + list(before), after, strict=True)):
        if is_one(old) and not is_one(new):
            f.axes[at] = (*f.axes[at], Factor(None, new))


def _repeat_interleave(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    dim, times = argument(node, 2, "dim"), argument(node, 1, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int):
        raise _Unknown
    f.axes[normal_dim(dim, len(f.axes))] += (Factor(None, times),)


def _repeat(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    f.axes = [()] * (len(after) - len(before)) + f.axes
    for at, (old, new) in enumerate(zip([1] * (len(after) - len(before)) + list(before), after, strict=True)):
        if not same(old, new):
            if not isinstance(old, int) or not isinstance(new, int):
                raise _Unknown
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
        raise _Unknown
    f.axes = result


def _group(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int]:
    """How many of the first axes on both sides have the same product."""
    for taken in range(1, len(before) + 1):
        for made in range(1, len(after) + 1):
            if same(math.prod(before[:taken]), math.prod(after[:made])):
                return taken, made
    raise _Unknown


def _same(f: Factors, node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> None:
    pass


_STEPS: dict[str, Callable[[Factors, fx.Node, Sequence[Any], Sequence[Any]], None]] = {
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
    **dict.fromkeys(("contiguous", "clone", "to", "type_as", "float"), _same),
}
