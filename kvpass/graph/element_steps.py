"""What an element of a call's result is by the elements of its operands, call by call. Add a spelling here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from kvpass.graph.calls import call_name, example, operand
from kvpass.graph.elements import At, amount, is_truth, scalar, truth
from kvpass.graph.shapes import is_one, normal_dim, shape_of


def _arange(at: At) -> Any:
    args = [scalar(example(a) if isinstance(a, fx.Node) else a) for a in at.node.args]
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    if {"start", "step"} & set(at.node.kwargs):
        return None
    return start + step * at.index[0]


def _same(at: At) -> Any:
    """Casts and copies."""
    found = at.of(operand(at.node))
    return truth(found) if at.bool else amount(found)


def _expanded(at: At) -> Any:
    return at.of(operand(at.node))


def _unsqueezed(at: At) -> Any:
    dim = normal_dim(at.given(1, "dim"), len(at.index))
    return at.of(operand(at.node), (*at.index[:dim], *at.index[dim + 1 :]))


def _reshaped(at: At) -> Any:
    """Axes of one element come and go; one axis becomes several, row by row."""
    before, after = shape_of(operand(at.node)), shape_of(at.node)
    wide = [(i, n) for i, n in zip(at.index, after, strict=True) if not is_one(n)]
    wanted = [n for n in before if not is_one(n)]
    same = [str(n) == str(m) for (_, n), m in zip(wide, wanted, strict=False)]
    first, parts = (same.index(False) if False in same else len(same)), len(wide) - len(wanted) + 1
    if parts > 1 and first < len(wanted):
        place = sympy.Integer(0)
        for i, n in wide[first : first + parts]:
            place = place * scalar(n) + i
        wide[first : first + parts] = [(place, wanted[first])]
    if [str(n) for n in wanted] != [str(n) for _, n in wide]:
        return None
    rest = iter(wide)
    return at.of(operand(at.node), tuple(sympy.Integer(0) if is_one(n) else next(rest)[0] for n in before))


def _transposed(at: At) -> Any:
    axes = len(at.index)
    order = list(range(axes))
    if call_name(at.node) == "permute":
        dims: Any = at.node.args[1:] if isinstance(at.node.args[1], int) else at.node.args[1]
        order = [normal_dim(d, axes) for d in dims]
    else:
        a, b = (normal_dim(at.given(n, name), axes) for n, name in ((1, "dim0"), (2, "dim1")))
        order[a], order[b] = b, a
    return at.of(operand(at.node), tuple(at.index[order.index(axis)] for axis in range(axes)))


def _item(at: At) -> Any:
    """`x[..]` with numbers, slices, new axes and tensors of indices, broadcast side by side."""
    given: Any = at.node.args[1]
    given = given if isinstance(given, tuple) else (given,)
    source = operand(at.node)
    axes = len(shape_of(source))
    if not axes:
        return None
    own = [one for one in given if one is not None and one is not Ellipsis]
    if Ellipsis not in given:
        given = (*given, Ellipsis)
    where = given.index(Ellipsis)
    given = (*given[:where], *[slice(None)] * (axes - len(own)), *given[where + 1 :])
    tensors = [n for n, one in enumerate(given) if isinstance(one, fx.Node) and shape_of(one)]
    if tensors and tensors != list(range(tensors[0], tensors[-1] + 1)):
        return None
    if any(isinstance(one, fx.Node) and getattr(example(one), "dtype", None) == torch.bool for one in given):
        return None
    together = max((len(shape_of(given[n])) for n in tensors), default=0)
    left, found = list(at.index), []
    for n, one in enumerate(given):
        if one is None:
            left.pop(0)
        elif isinstance(one, slice):
            start = scalar(one.start or 0)
            if one.step not in (None, 1) or _below_zero(start):
                return None
            found.append(left.pop(0) + start)
        elif n in tensors:
            found.append(at.of(one, tuple(left[:together])))
            if n == tensors[-1]:
                left = left[together:]
        else:
            number = at.of(one, ()) if isinstance(one, fx.Node) else scalar(one)
            if _below_zero(number):
                return None
            found.append(number)
    return at.of(source, tuple(found)) if len(found) == axes else None


def _below_zero(start: Any) -> bool:
    return bool(start.is_negative) if start.is_number else not start.is_nonnegative


_COMPARISONS = {"lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge, "eq": sympy.Eq, "ne": sympy.Ne}


def _compared(at: At) -> Any:
    left, right = at.of(at.node.args[0]), at.of(at.given(1, "other"))
    name = call_name(at.node)
    if is_truth(left) and right.is_number and name in ("eq", "ne"):
        return (
            left if bool(right) == (name == "eq") and right in (0, 1) else sympy.Not(left) if right in (0, 1) else None
        )
    return _COMPARISONS[name](amount(left), amount(right))


def _both(at: At) -> Any:
    parts = [truth(at.of(part)) for part in (at.node.args[0], at.given(1, "other"))]
    return (sympy.Or if "or" in call_name(at.node) else sympy.And)(*parts) if at.bool else None


def _inverted(at: At) -> Any:
    return sympy.Not(truth(at.of(operand(at.node)))) if at.bool else None


def _sum(at: At) -> Any:
    if at.given(2, "alpha", 1) != 1:
        return None
    left, right = (amount(at.of(part)) for part in (at.node.args[0], at.given(1, "other")))
    return {"sub": left - right, "rsub": right - left}.get(call_name(at.node), left + right)


def _product(at: At) -> Any:
    parts = [at.of(part) for part in (at.node.args[0], at.given(1, "other"))]
    return sympy.And(*map(truth, parts)) if at.bool else amount(parts[0]) * amount(parts[1])


def _negated(at: At) -> Any:
    return -amount(at.of(operand(at.node)))


def _divided(at: At) -> Any:
    if call_name(at.node) == "div" and at.node.kwargs.get("rounding_mode") != "floor":
        return None
    return sympy.floor(amount(at.of(at.node.args[0])) / amount(at.of(at.given(1, "other"))))


def _filled(at: At) -> Any:
    """`where(condition, a, b)` and `masked_fill(a, condition, b)`"""
    if call_name(at.node) == "where":
        if len(at.node.args) < 3:
            return None
        condition, yes, no = at.node.args
    else:
        no, condition, yes = at.node.args[0], at.given(1, "mask"), at.given(2, "value")
    where, yes, no = truth(at.of(condition)), at.of(yes), at.of(no)
    if at.bool:
        return sympy.Or(sympy.And(where, truth(yes)), sympy.And(sympy.Not(where), truth(no)))
    return sympy.Piecewise((amount(yes), where), (amount(no), True))


def _concatenated(at: At) -> Any:
    """By cases: which part an element is in; the last, if it is in none before, as an index is within its tensor."""
    axis = normal_dim(at.given(1, "dim", 0), len(at.index))
    found: list[tuple[Any, Any]] = []
    start: Any = sympy.Integer(0)
    parts = at.given(0, "tensors")
    for part in parts:
        end = start + scalar(shape_of(part)[axis])
        inside = sympy.true if part is parts[-1] else sympy.Lt(at.index[axis], end)
        if inside != sympy.false:
            here = (*at.index[:axis], at.index[axis] - start, *at.index[axis + 1 :])
            found.append((at.of(part, here), inside))
        if inside == sympy.true:
            break
        start = end
    return _cases(found, at.bool)


def _padded(at: At) -> Any:
    """`F.pad` with a constant."""
    pads, mode = at.given(1, "pad"), at.given(2, "mode", "constant")
    sizes = shape_of(operand(at.node))
    if mode != "constant" or any(not isinstance(n, int) or n < 0 for n in pads) or not any(pads[::2]):
        return None  # behind the last token, in a buffer's unwritten rest: the padded tensor says which are tokens
    place, inside = list(at.index), sympy.true
    for last, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        place[-last] -= left
        inside = sympy.And(inside, place[-last] >= 0) if left else inside
        inside = sympy.And(inside, sympy.Lt(place[-last], scalar(sizes[-last]))) if right else inside
    fill = scalar(at.given(3, "value") or 0)
    if inside == sympy.false:
        return truth(fill) if at.bool else amount(fill)
    return _cases([(at.of(operand(at.node), tuple(place)), inside), (fill, sympy.true)], at.bool)


def _cases(found: list[tuple[Any, Any]], as_truth: bool) -> Any:
    """The first whose condition holds."""
    if found[0][1] == sympy.true:
        return truth(found[0][0]) if as_truth else amount(found[0][0])
    if not as_truth:
        return sympy.Piecewise(*((amount(value), condition) for value, condition in found))
    result, before = sympy.false, sympy.true
    for value, condition in found:
        result = sympy.Or(result, sympy.And(before, condition, truth(value)))
        before = sympy.And(before, sympy.Not(condition))
    return result


_FULL = {"full": 1, "full_like": 1, "new_full": 2}


def _constant(at: At) -> Any:
    name = call_name(at.node)
    if name in _FULL:
        value = at.given(_FULL[name], "fill_value")
        found = at.of(value, ()) if isinstance(value, fx.Node) else scalar(value)
    else:
        found = sympy.Integer(int("ones" in name))
    return truth(found) if at.bool else amount(found)


def _triangle(at: At) -> Any:
    row, column = at.index[-2:]
    beyond = column - row - scalar(at.given(1, "diagonal", 0))
    kept = beyond <= 0 if "tril" in call_name(at.node) else beyond >= 0
    found = at.of(operand(at.node))
    return sympy.And(kept, truth(found)) if at.bool else sympy.Piecewise((found, kept), (0, True))


STEPS: dict[str, Callable[[At], Any]] = {
    "arange": _arange,
    **dict.fromkeys(("to", "bool", "float", "half", "bfloat16", "long", "int", "type", "type_as"), _same),
    **dict.fromkeys(("contiguous", "clone", "detach"), _same),
    "expand": _expanded,
    "unsqueeze": _unsqueezed,
    **dict.fromkeys(("reshape", "squeeze"), _reshaped),
    **dict.fromkeys(("transpose", "permute"), _transposed),
    "getitem": _item,
    **dict.fromkeys(_COMPARISONS, _compared),
    **dict.fromkeys(("and_", "logical_and", "bitwise_and", "or_", "logical_or", "bitwise_or"), _both),
    **dict.fromkeys(("invert", "logical_not", "bitwise_not"), _inverted),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    "mul": _product,
    "neg": _negated,
    **dict.fromkeys(("floordiv", "floor_divide", "div"), _divided),
    **dict.fromkeys(("where", "masked_fill"), _filled),
    "cat": _concatenated,
    "pad": _padded,
    **dict.fromkeys(("full", "full_like", "new_full", "ones", "ones_like", "new_ones"), _constant),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant),
    **dict.fromkeys(("tril", "triu"), _triangle),
}
