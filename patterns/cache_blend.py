"""Update: a buffer that is blended with its new token: `torch.where(hit, new, old)`, `old * (1 - hit) + new * hit`.

`hit` is the one-hot of the token's place: `arange(n) == at`, `one_hot(at, n)`. The buffer is a graph input, and what
comes back is the graph's own tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, example, is_input, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.numbers import PRODUCTS, number
from kvpass.graph.shapes import is_one, same, shape_of
from kvpass.graph.views import is_view
from kvpass.sites.site import Update
from kvpass.terms import CacheForm

SUMS = frozenset({"add", "iadd", "add_"})
CASTS = frozenset({"to", "float", "type", "type_as", "half", "bfloat16", "int", "long", "bool"})
NOTS = frozenset({"invert", "bitwise_not", "logical_not"})


class Hit(NamedTuple):
    """Where a tensor is one, or where it is not."""

    at: Any
    inverted: bool
    nodes: tuple[fx.Node, ...]


class Blend(NamedTuple):
    old: Any
    new: Any
    hit: fx.Node
    at: Any
    inner: tuple[fx.Node, ...]


class BlendUpdate:
    name = "blend"

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at a blend that the graph returns.

        Raises:
            Miss: DTYPE.
        """
        if node not in flow.outputs or len(shape_of(node)) < 3 or not example(node).is_floating_point():
            return None
        found = _where(node) if call_name(node) == "where" else _sum(node) if call_name(node) in SUMS else None
        if found is None or not isinstance(found.old, fx.Node) or not isinstance(found.new, fx.Node):
            return None
        axis = _axis(node, found)
        if axis is None or not is_input(found.old):
            return None
        if example(found.old).dtype != example(found.new).dtype:
            what = f"{example(found.new).dtype} is written into a buffer of {example(found.old).dtype}"
            miss = Miss(Reason.DTYPE, node, what, (found.new,))
            miss.axis = axis
            raise miss
        place = node, found.at, (), found.inner
        return Update(node, found.new, found.old, axis, CacheForm.BUFFER, self.name, *place)


def _axis(node: fx.Node, found: Blend) -> int | None:
    """The tokens' axis: the buffer is as long as the hit there, the new token is one."""
    sizes, old, new, hit = (shape_of(n) for n in (node, found.old, found.new, found.hit))
    if len(old) != len(sizes) or len(new) != len(sizes) or not all(map(same, old, sizes)):
        return None
    axes = [at for at, (a, b) in enumerate(zip(sizes, new, strict=True)) if not same(a, b)]
    if len(axes) != 1 or not is_one(new[axes[0]]):
        return None
    hit = (1,) * (len(sizes) - len(hit)) + hit
    wide = [at for at, size in enumerate(hit) if not is_one(size)]
    return axes[0] if wide in ([axes[0]], [0, axes[0]]) and same(hit[axes[0]], sizes[axes[0]]) else None


def _where(node: fx.Node) -> Blend | None:
    condition, yes, no = (argument(node, at, name) for at, name in enumerate(("condition", "input", "other")))
    hit = _hit(condition)
    if hit is None:
        return None
    new, old = (no, yes) if hit.inverted else (yes, no)
    return Blend(old, new, condition, hit.at, ())


def _sum(node: fx.Node) -> Blend | None:
    """`old * miss + new * hit` in any order; `old.masked_fill(hit, 0)` for the first of them."""
    left, right = (_masked(argument(node, at, name)) for at, name in enumerate(("input", "other")))
    if left is None or right is None or node.kwargs.get("alpha", 1) != 1:
        return None
    (a, hit_a, factor_a, inner_a), (b, hit_b, factor_b, inner_b) = left, right
    if hit_a.inverted == hit_b.inverted or hit_a.at is not hit_b.at:
        return None
    old, new = (a, b) if hit_a.inverted else (b, a)
    return Blend(old, new, factor_b if hit_a.inverted else factor_a, hit_a.at, (*inner_a, *inner_b))


def _masked(node: Any) -> tuple[Any, Hit, fx.Node, tuple[fx.Node, ...]] | None:
    """A tensor that is zero at the hit, or but there."""
    name = call_name(node) if isinstance(node, fx.Node) else ""
    if name == "masked_fill" and number(argument(node, 2, "value")) == 0.0:
        mask = argument(node, 1, "mask")
        hit = _hit(mask)
        return None if hit is None else (operand(node), hit._replace(inverted=not hit.inverted), mask, (node,))
    if name not in PRODUCTS:
        return None
    left, right = node.args[0], argument(node, 1, "other")
    for whole, factor in ((left, right), (right, left)):
        hit = _hit(factor)
        if hit is not None:
            return whole, hit, factor, (node,)
    return None


def _hit(node: Any, inverted: bool = False, depth: int = 12) -> Hit | None:
    """The place of a one-hot tensor; `inverted` for one that is zero there and one elsewhere."""
    if not isinstance(node, fx.Node) or depth == 0:
        return None
    name = call_name(node)
    if name in ("eq", "ne"):
        left, right = node.args[0], argument(node, 1, "other")
        for counter, at in ((left, right), (right, left)):
            if _counts(counter) and _is_place(at):
                return Hit(at, inverted != (name == "ne"), ())
        return None
    if name == "one_hot":
        return Hit(operand(node), inverted, ()) if _is_place(operand(node)) else None
    if name in NOTS:
        return _hit(operand(node), not inverted, depth - 1)
    if name in ("rsub", "sub"):
        whole, part = (node.args[0], argument(node, 1, "other"))[:: -1 if name == "rsub" else 1]
        return _hit(part, not inverted, depth - 1) if number(whole) == 1.0 else None
    if name in CASTS or is_view(node):
        return _hit(operand(node), inverted, depth - 1)
    return None


def _counts(node: Any) -> bool:
    """0, 1, 2, .. along one axis."""
    while isinstance(node, fx.Node) and (is_view(node) or call_name(node) in CASTS):
        node = operand(node)
    if not isinstance(node, fx.Node) or call_name(node) != "arange" or len(node.args) > 2:
        return False
    start = node.args[0] if len(node.args) == 2 else node.kwargs.get("start", 0)
    return bool(start == 0 and node.kwargs.get("step", 1) == 1)


def _is_place(value: Any) -> bool:
    """A number, or one for each sequence."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int)
    sizes = shape_of(value)
    if not sizes:
        return True
    return all(map(is_one, sizes[1:])) and not example(value).is_floating_point()
