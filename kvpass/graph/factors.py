"""Axes of a tensor followed through views as products of factors: what is split, cut, joined and repeated.

An axis is read row by row over its factors, the last one fastest. `view(b, t, 2, h, d)` splits the last axis of a
cached [B, T, 2 * H * D] into three factors, `[:, :, 0]` cuts the first of them to one number, `reshape` joins others.
So views of any kind are followed exactly, and what is left can be said of the cached tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


class Unknown(Exception):
    """A view that is not followed."""


class Factors:
    """Axes of a tensor made from `base` by views.

    Args:
        steps: by the name of a view, what it does to the axes.

    Attributes:
        roots: of each axis of the base, the factors that it is split into, in order; those that are cut away too.
        axes: of the tensor; an axis that a view has made anew is ().
    """

    def __init__(self, base: fx.Node, steps: Mapping[str, Callable[..., None]]) -> None:
        self.steps = steps
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
                        self.steps[call_name(node)](self, node, shape_of(before), shape_of(node))
                except (Unknown, KeyError):
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
            raise Unknown
        first, inner = parts[0], math.prod((f.size for f in parts[1:]), start=1)
        if start % inner or size % inner:
            if len(parts) < 2 or start // inner != (start + size - 1) // inner:
                raise Unknown
            self._replace(first, [Factor(first.root, 1, first.start + start // inner, first.of)], axis)
            self.axes[axis] = self.axes[axis][1:]  # one number of the outer factor, and some of the inner ones
            self.cut(axis, start % inner, size)
            return
        self._replace(first, [Factor(first.root, size // inner, first.start + start // inner, first.of)], axis)

    def drop(self, axis: int, at: int) -> None:
        """Keep one number of an axis, and not the axis."""
        whole = math.prod((f.size for f in self.axes[axis]), start=1)
        if not isinstance(at, int) or not isinstance(whole, int):
            raise Unknown
        self.cut(axis, at % whole, 1)
        del self.axes[axis]

    def lengthen(self, axis: int, sizes: Sequence[Any]) -> None:
        """Take a whole axis of the base for one that is as long as in `sizes`."""
        parts = self.axes[axis]
        if len(parts) != 1 or not parts[0].whole:
            raise Unknown
        self._replace(parts[0], [Factor(parts[0].root, sizes[axis], 0, sizes[axis])], axis)

    def split(self, parts: Axis, sizes: Sequence[Any]) -> list[Axis]:
        """Factors, read row by row, as axes of these sizes."""
        left, found = list(parts), []
        for size in sizes:
            axis: list[Factor] = []
            need = size
            while not is_one(need):
                if not left:
                    raise Unknown
                first = left.pop(0)
                if not same(first.size, need) and isinstance(first.size, int) and isinstance(need, int):
                    if first.size > need:
                        outer, inner = self._halved(first, need)
                        axis.append(outer)
                        left.insert(0, inner)
                        break
                    if first.size == 0 or need % first.size:
                        raise Unknown
                    need //= first.size
                elif same(first.size, need):
                    need = 1
                else:
                    raise Unknown
                axis.append(first)
            found.append(tuple(axis))
        if any(not is_one(f.size) for f in left):
            raise Unknown
        return found

    def _halved(self, factor: Factor, outer: int) -> tuple[Factor, Factor]:
        if factor.root is None or factor.size % outer:
            raise Unknown
        inner = factor.size // outer
        if factor.start % inner or factor.of % inner:
            raise Unknown
        halves = (
            Factor(factor.root, outer, factor.start // inner, factor.of // inner),
            Factor(factor.root, inner, 0, inner),
        )
        self._replace(factor, list(halves))
        return halves

    def _replace(self, old: Factor, new: list[Factor], axis: int | None = None) -> None:
        """Put others in the place of a factor, among the base's and, if asked, in an axis."""
        if old.root is None:
            raise Unknown
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
