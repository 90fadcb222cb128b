"""Which keys a query sees, proved: a mask's formula as causality, window, chunks and real tokens.

A mask is proved if its formula (`kvpass.graph.elements`) is a conjunction of conditions that are known here; then the
mask is those conditions, for all sizes and whatever the inputs hold. Nothing is guessed: a condition that is not known
leaves the mask a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.elements import Element, Elements, amount, is_changed, truth
from kvpass.graph.shapes import is_one, shape_of
from kvpass.graph.visibility import Visibility
from kvpass.terms import MaskKind

LOW = -1e8
"""A number that is added to a logit and hides its key, as the ops have it (`masks.threshold`)."""

B, H, Q, K = sympy.symbols("b h i j", integer=True, nonnegative=True)
"""Of a sequence, a query head, a query of the call, a column."""
BACK = sympy.Symbol("n", integer=True, nonnegative=True)
"""How far in front of the last."""
LETTERS = {"B": B, "H": H, "S": Q, "T": K, **{letter: sympy.Symbol(letter) for letter in "GN"}}


class Unproved(Exception):
    """A condition that is not known here; its text is for people."""


Part = tuple[fx.Node, MaskKind, str, float]
"""Node, kind, axes by letter and factor of a part of a mask."""


def visibility(
    terms: Sequence[Part], found: Visibility, position: Any, elements: Elements, behind: int = 0
) -> Visibility:
    """What the parts of a mask say together.

    Args:
        terms: the parts.
        found: what the attention hides without them.
        position: sympy; the position of query `Q`.
        behind: columns in front of that of the first key.
    """
    for place, term in enumerate(terms):
        try:
            found = _proved(found, term, position, elements, behind)
        except Unproved as reason:
            why = (f"{term[0].name}: {reason}",) if _is_wide(term[0], term[2]) else ()
            found = replace(found, read=(*found.read, place), why=(*found.why, *why))
    return found


def hidden_front(terms: Sequence[Part], count: int, elements: Elements) -> str:
    """What may be hidden of the first `count` columns, or added to them, by the part of a mask that says so; "" if
    proved that nothing is.
    """
    for term in terms:
        try:
            shown = _shown(term, elements, count - 1 - BACK)
        except Unproved as reason:
            return f"{term[0].name}: {reason}"
        if shown != sympy.true:
            return f"{term[0].name}: {shown}"
    return ""


def _is_wide(node: fx.Node, axes: str) -> bool:
    """Whether a part of a mask differs from query to query."""
    sizes = dict(zip(reversed(axes), reversed(shape_of(node)), strict=False))
    return not is_one(sizes.get("S", 1))


def _proved(found: Visibility, term: Part, position: Any, elements: Elements, behind: int) -> Visibility:
    formula = _shown(term, elements, K + behind)
    if term[1] is MaskKind.ADD:
        found = replace(found, mean=True)
    for condition in conditions(formula):
        found = _with(found, condition, position, elements)
    return found


def _shown(term: Part, elements: Elements, column: Any) -> Any:
    """When a part of a mask shows a column, as a condition."""
    node, kind, axes, factor = term
    if is_changed(node):
        raise Unproved("it is changed in place")
    letters = {**LETTERS, "T": column}
    index = tuple(letters.get(letter) for letter in axes)[len(axes) - example(node).dim() :]
    formula = elements.at(node, index)
    if kind is MaskKind.ADD:
        dtype = example(node).dtype
        low = max(torch.finfo(dtype).min / 2, LOW) if dtype.is_floating_point else LOW
        formula = amount(formula)
        formula = switched(formula * factor if factor != 1.0 else formula, low)
    elif kind is MaskKind.HIDE:
        formula = sympy.Not(truth(formula))
    return truth(formula)


def switched(formula: Any, low: float) -> Any:
    """Where a number that is added to a logit is 0, if it is at most `low` everywhere else, which hides."""
    if formula.is_number:
        if formula.is_zero or formula <= low:
            return sympy.true if formula.is_zero else sympy.false
        raise Unproved(f"{formula} is added")
    if isinstance(formula, sympy.Piecewise):
        found, before = sympy.false, sympy.true
        for part, condition in formula.args:
            found = sympy.Or(found, sympy.And(before, condition, switched(part, low)))
            before = sympy.And(before, sympy.Not(condition))
        return found
    if isinstance(formula, sympy.Add):
        if any(part.is_number for part in formula.args):
            together = sympy.piecewise_fold(formula)
            if isinstance(together, sympy.Piecewise):
                return switched(together, low)
        return sympy.And(*(switched(part, low) for part in formula.args))
    factor, rest = formula.as_coeff_Mul()
    if factor <= low and isinstance(rest, sympy.Piecewise) and all(part in (0, 1) for part, _ in rest.args):
        return sympy.Not(truth(rest))
    raise Unproved(f"{formula} is added")


def conditions(formula: Any) -> tuple[Any, ...]:
    """Those that all must hold."""
    normal = sympy.to_nnf(formula, simplify=False)
    if isinstance(normal, sympy.Or):
        few = len(normal.atoms(sympy.core.relational.Relational)) < 8
        normal = sympy.simplify_logic(normal, form="cnf", deep=False) if few else normal
    return tuple(sympy.And.make_args(normal))


def _with(found: Visibility, condition: Any, position: Any, elements: Elements) -> Visibility:
    """One more condition; `position` is that of the query."""
    if condition == sympy.true:
        return found
    if isinstance(condition, (sympy.Ne, sympy.Eq)):
        token = _token(condition, elements)
        if token is None:
            return replace(found, chunk=_chunk(condition, position))
        if found.tokens not in (None, token):
            raise Unproved(f"two masks of tokens, {found.tokens} and {token}")
        return replace(found, tokens=token)
    if isinstance(condition, sympy.core.relational.Relational):
        return _bounded(found, condition, position)
    raise Unproved(str(condition))


def _token(condition: Any, elements: Elements) -> fx.Node | None:
    """A tensor [B, T] that is not 0 in the key's column."""
    element, value = condition.args
    if not isinstance(element, Element) or value != 0 or not isinstance(condition, sympy.Ne):
        return None
    name, *index = element.args
    node = elements.nodes[str(name)]
    if is_changed(node):
        raise Unproved(f"{node.name} is changed in place")
    if len(index) != 2 or index[1] != K:
        return None
    return node if index[0] == (0 if is_one(shape_of(node)[0]) else B) else None


def _chunk(condition: Any, position: Any) -> int:
    """`k // n == p // n`"""
    sides = condition.args
    if isinstance(condition, sympy.Eq) and all(isinstance(side, sympy.floor) for side in sides):
        keys, queries = sorted((side.args[0] for side in sides), key=lambda side: not side.has(K))
        number = sympy.simplify(K / keys) if keys.has(K) else None
        if number is not None and number.is_Integer and sympy.expand(queries * number - position) == 0:
            return int(number)
    raise Unproved(str(condition))


def _bounded(found: Visibility, condition: Any, position: Any) -> Visibility:
    """`k <= p` and `k > p - n`."""
    left, right = condition.args
    kind = type(condition)
    margin = left - right if kind in (sympy.Ge, sympy.Gt) else right - left
    margin = margin - (1 if kind in (sympy.Gt, sympy.Lt) else 0)
    if sympy.expand(margin - (position - K)) == 0:
        return replace(found, causal=True)
    width = sympy.expand(margin - K + position + 1)
    if width.is_Integer and width > 0:
        return replace(found, window=min(int(width), found.window or int(width)))
    raise Unproved(str(condition))
