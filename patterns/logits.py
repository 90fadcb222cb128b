"""From the argument of a softmax up to the product of queries and keys: what is done to the logits on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.miss import Miss
from kvpass.graph.numbers import NO_WEIGHT, PRODUCTS, QUOTIENTS, factor_of, number
from kvpass.graph.product import Product, logits_product
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of
from kvpass.sites.site import Term
from kvpass.terms import MaskKind

SAME = frozenset({"to", "float", "type", "half", "bfloat16", "type_as", "contiguous", "clone", "_to_copy", "alias"})
SUMS = frozenset({"add", "iadd", "add_"})
DIFFERENCES = frozenset({"sub", "isub", "sub_", "subtract"})
BOUNDS = frozenset({"max", "maximum", "clamp", "clamp_min", "clip", "nan_to_num"})
FILLS = frozenset({"masked_fill", "masked_fill_"})
LIMIT = 40
"""Nodes between softmax and product, many more than any attention has."""


@dataclass
class Logits:
    """What the walk has met. `factor` multiplies whatever comes next on the way up."""

    product: Product | None = None
    factor: float = 1.0
    softcap: float = 0.0
    sinks: fx.Node | None = None
    terms: list[Term] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def leads(node: Any, depth: int = 16) -> TypeGuard[fx.Node]:
    """Is there a product of queries and keys above, with nothing between that a walk does not know?"""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    if logits_product(node) is not None:
        return True
    name = call_name(node)
    known = SAME | SUMS | DIFFERENCES | BOUNDS | FILLS | {"where", "tanh", "reshape", "cat"}
    if name not in known and factor_of(node) is None and name not in ("mul", "truediv", "div"):
        return False
    return any(leads(n, depth - 1) for n in node.all_input_nodes if len(shape_of(n)) >= 3)


def first_product(node: Any, depth: int = 16) -> Product | None:
    """The nearest product of queries and keys above."""
    if not isinstance(node, fx.Node) or depth == 0:
        return None
    found = logits_product(node)
    above = (first_product(n, depth - 1) for n in node.all_input_nodes if len(shape_of(n)) >= 3)
    return found if found is not None else next((p for p in above if p is not None), None)


def is_cast_of_numbers(node: fx.Node) -> bool:
    """A cast, if it is one, between float types of at least 16 bits."""
    return example(node).dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_logits(node: fx.Node, softmax: fx.Node) -> Logits:
    """Walk up from a softmax's argument to the product of queries and keys, which `leads` has seen above.

    Raises:
        Miss: something on the way changes the logits in a form that is not known.
    """
    found = Logits()
    current, reader = node, softmax
    for _ in range(LIMIT):
        for change in _changes(current, reader):
            found.nodes.append(change)
            _step(found, change)
        found.nodes.append(current)
        product = logits_product(current)
        if product is not None:
            return _finish(found, product)
        current, reader = _step(found, current), current
    raise Miss(Reason.UNSUPPORTED_ATTENTION, current, "too many operations between product and softmax")


def _changes(node: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """Operations that change a value in place before it is read, and whose own result nobody reads; last first."""
    found = [n for n in node.users if changes(n) and operand(n) is node and not n.users and n < reader]
    return sorted(found, reverse=True)


def _finish(found: Logits, product: Product) -> Logits:
    if product.added is not None:
        _add(found, product.added, product.node, found.factor * product.beta)
    found.product, found.factor = product, found.factor * product.alpha
    return found


def _step(found: Logits, node: fx.Node) -> fx.Node:
    """Take in one operation; what it was done to."""
    name = call_name(node)
    factor = factor_of(node)
    if factor is not None:
        found.factor *= factor
        return next(n for n in node.all_input_nodes if len(shape_of(n)) >= 3)
    for names, take in _STEPS:
        if name in names:
            return take(found, node)
    raise _unknown(node)


def _above(node: fx.Node) -> fx.Node:
    """The logits before an operation on them."""
    above: fx.Node = operand(node)
    return above


def _unknown(node: fx.Node, what: str = "") -> Miss:
    scales = not what and call_name(node) in PRODUCTS | QUOTIENTS
    hint = "scale by a number (math.sqrt(d)), or scale the queries: a graph does not show what a tensor holds"
    what = what or f"the logits go through {call_name(node)}" + " with a tensor" * scales
    return Miss(Reason.UNSUPPORTED_ATTENTION, node, what, hint=hint if scales else "")


def _same(found: Logits, node: fx.Node) -> fx.Node:
    if not is_cast_of_numbers(node):
        raise _unknown(node, f"the logits become {example(node).dtype}")
    return _above(node)


def _reshaped(found: Logits, node: fx.Node) -> fx.Node:
    """Only between the forms of logits: [N, S, T], [B, H, S, T], [B, H, G, S, T]."""
    below, above = shape_of(node), shape_of(operand(node))
    small, large = sorted((below, above), key=len)
    kept = len(small) >= 3 and all(same(a, b) for a, b in zip(small[-2:], large[-2:], strict=True))
    if not kept or len(large) > 5:
        raise _unknown(node, f"the logits are viewed from {tuple(above)} to {tuple(below)}")
    return _above(node)


def _added(found: Logits, node: fx.Node) -> fx.Node:
    left, right = node.args[0], argument(node, 1, "other")
    if number(node.kwargs.get("alpha", 1)) != 1.0:
        raise _unknown(node, "add with alpha")
    if leads(left) and leads(right):
        raise _unknown(node, "two products are added: scores are not one product of queries and keys")
    through, other = (left, right) if leads(left) else (right, left)
    _add(found, other, node, found.factor)
    return through


def _subtracted(found: Logits, node: fx.Node) -> fx.Node:
    left, right = node.args[0], argument(node, 1, "other")
    if not leads(left) or number(node.kwargs.get("alpha", 1)) != 1.0:
        raise _unknown(node, "the logits are subtracted from something")
    row_max = _row_max(right, left)
    if row_max:
        if found.softcap or found.sinks is not None:
            raise _unknown(node, "the maximum is taken off before the softcap or the sinks")
        found.nodes += row_max
        return left  # softmax does not see it
    if isinstance(right, fx.Node) and leads(right):
        raise _unknown(node, "two products are subtracted")
    _add(found, right, node, -found.factor)
    return left


def _row_max(node: Any, logits: Any) -> list[fx.Node]:
    """The nodes that take the largest logit of each row, last first; none if `node` is something else."""
    passed: list[fx.Node] = []
    while isinstance(node, fx.Node) and call_name(node) in SAME | {"detach", "getitem"}:
        passed.append(node)
        node = operand(node)
    found = call_name(node) in ("max", "amax") and operand(node) is logits if isinstance(node, fx.Node) else False
    wide = [n for n in (*passed, node) if shape_of(n) and not is_one(shape_of(n)[-1])]
    return [*passed, node] if found and not wide else []


def _add(found: Logits, other: Any, node: fx.Node, factor: float) -> None:
    if number(other) == 0.0:
        return
    if found.softcap:
        raise _unknown(node, "something is added inside the softcap")
    if number(other) is not None or not shape_of(other):  # the same for all keys
        if found.sinks is not None:
            raise _unknown(node, "a number is added to the logits and not to the sinks")
        return
    _take_term(found, other, MaskKind.ADD, node, factor)


def _take_term(found: Logits, other: Any, kind: MaskKind, node: fx.Node, factor: float = 1.0) -> None:
    space = {3: "NST", 4: "BHST", 5: "BHGST"}.get(len(shape_of(node)), "")
    if not isinstance(other, fx.Node) or not space or len(shape_of(other)) > len(space):
        raise Miss(Reason.MASK_SHAPE, node, f"a mask of shape {tuple(shape_of(other))}")
    if (example(other).dtype.is_floating_point) != (kind is MaskKind.ADD):
        hint = "add a mask of floats (mask.to(logits.dtype)), or hide by a bool one"
        raise Miss(Reason.MASK_SHAPE, node, f"a mask of dtype {example(other).dtype}", hint=hint)
    heads = tuple(shape_of(node)[1:-2])  # those of the view that is masked, which may not be the product's
    known = all(isinstance(size, int) for size in heads)
    found.terms.append(Term(other, kind, space, factor, heads if known else ()))


def _where(found: Logits, node: fx.Node) -> fx.Node:
    condition, yes, no = node.args[0], argument(node, 1, "input"), argument(node, 2, "other")
    if leads(yes) == leads(no):
        raise _unknown(node)
    through, fill = (yes, no) if leads(yes) else (no, yes)
    _check_fill(found, fill, node)
    _take_term(found, condition, MaskKind.KEEP if through is yes else MaskKind.HIDE, node)
    return through


def _masked_fill(found: Logits, node: fx.Node) -> fx.Node:
    _check_fill(found, argument(node, 2, "value"), node)
    _take_term(found, argument(node, 1, "mask"), MaskKind.HIDE, node)
    return _above(node)


def _check_fill(found: Logits, fill: Any, node: fx.Node) -> None:
    value = number(fill)
    if value is None or value * found.factor > NO_WEIGHT or found.softcap:
        if value is None:
            what = "hidden keys get a logit that a tensor holds, which a graph does not show"
            hint = "give it as a number: float('-inf') or torch.finfo(dtype).min"
            raise Miss(Reason.MASK_UNKNOWN, node, what, hint=hint)
        raise Miss(Reason.MASK_UNKNOWN, node, f"hidden keys get the logit {value:g}")


def _bounded(found: Logits, node: fx.Node) -> fx.Node:
    """A lower bound so low that only hidden keys meet it."""
    if call_name(node) == "nan_to_num":
        return _above(node)
    sides = [node.args[0], argument(node, 1, "other", argument(node, 1, "min"))]
    if argument(node, 2, "max") is not None or "dim" in node.kwargs:
        raise _unknown(node)
    low = next((number(side) for side in sides if number(side) is not None), None)
    if low is None or low * found.factor > NO_WEIGHT:
        raise _unknown(node, "the logits are clamped")
    return next(side for side in sides if leads(side))


def _tanh(found: Logits, node: fx.Node) -> fx.Node:
    if found.softcap:
        raise _unknown(node, "two softcaps")
    found.softcap, found.factor = found.factor, 1.0
    return _above(node)


def _with_sinks(found: Logits, node: fx.Node) -> fx.Node:
    """`cat([logits, sinks], -1)`: one more column."""
    parts = argument(node, 0, "tensors")
    rank = len(shape_of(node))
    last = normal_dim(argument(node, 1, "dim", 0), rank) == rank - 1
    if not last or len(parts) != 2 or not leads(parts[0]) or not is_one(shape_of(parts[1])[-1]) or found.sinks:
        raise _unknown(node, "the logits are concatenated with something that is no column of sinks")
    if found.terms or found.softcap or found.factor != 1.0:
        raise _unknown(node, "the sinks are masked or scaled")
    found.sinks = parts[1]
    return parts[0]


_STEPS = (
    (SAME, _same),
    ({"reshape"}, _reshaped),
    (SUMS, _added),
    (DIFFERENCES, _subtracted),
    ({"where"}, _where),
    (FILLS, _masked_fill),
    (BOUNDS, _bounded),
    ({"tanh"}, _tanh),
    ({"cat"}, _with_sinks),
)
