"""Which keys a query sees, proved: a mask's formula as causality, window, chunks and real tokens.

A mask is proved if its formula (`kvpass.graph.elements`) is a conjunction of conditions that are known here; then the
mask is those conditions, for all sizes and whatever the inputs hold. Nothing is guessed: a condition that is not known
leaves the mask a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.elements import Element, Elements, truth
from kvpass.terms import MaskKind

LOW = -1e4
"""A number that is added to a logit and hides its key. Other numbers than 0 above it leave a tensor."""

B, H, Q, K = sympy.symbols("b h i j", integer=True, nonnegative=True)
"""Of a sequence, a query head, a query of the call, a column."""
LETTERS = {"B": B, "H": H, "S": Q, "T": K}


@dataclass(frozen=True)
class Visibility:
    """A query at position p sees the key in column k if all that is set here says so.

    Attributes:
        causal: k <= p.
        window: above 0: k > p - window.
        chunk: above 0: k // chunk == p // chunk.
        tokens: [B, T], not 0 where a column holds a token; None: everywhere.
    """

    causal: bool = False
    window: int = 0
    chunk: int = 0
    tokens: fx.Node | None = None

    def words(self) -> str:
        """For people and for the ops: `causal window=4096 tokens`."""
        parts = [
            "causal" if self.causal else "",
            f"window={self.window}" if self.window else "",
            f"chunk={self.chunk}" if self.chunk else "",
            "tokens" if self.tokens is not None else "",
        ]
        return " ".join(filter(None, parts)) or "all"


class Unproved(Exception):
    """A condition that is not known here; its text is for people."""


def proved(terms: Iterable[tuple[fx.Node, MaskKind, str, float]], causal: bool, start: Any, queries: Any) -> Visibility:
    """What the parts of a mask say together.

    Args:
        terms: node, kind, axes by letter and factor of each part.
        causal: whether the attention is causal by itself, from position 0 on.
        start: sympy; the position of the call's first query.
        queries: sympy; how many there are.

    Raises:
        Unproved: what keeps the mask a tensor.
    """
    found, elements, position = Visibility(causal=causal), Elements(), start + (0 if queries == 1 else Q)
    for node, kind, axes, factor in terms:
        index = tuple(LETTERS.get(letter) for letter in axes)[len(axes) - example(node).dim() :]
        if None in index:
            raise Unproved(f"axes {axes}")
        formula = elements.at(node, index)
        if kind is MaskKind.ADD:
            formula = switched(formula * factor if factor != 1.0 else formula)
        elif kind is MaskKind.HIDE:
            formula = sympy.Not(truth(formula))
        for condition in conditions(truth(formula)):
            found = _with(found, condition, position, elements)
    return found


def switched(formula: Any) -> Any:
    """Where a number that is added to a logit is 0, if it hides everywhere else."""
    if formula.is_number:
        if formula == 0 or formula <= LOW:
            return sympy.true if formula == 0 else sympy.false
        raise Unproved(f"{formula} is added")
    if isinstance(formula, sympy.Piecewise):
        found, before = sympy.false, sympy.true
        for part, condition in formula.args:
            found = sympy.Or(found, sympy.And(before, condition, switched(part)))
            before = sympy.And(before, sympy.Not(condition))
        return found
    if isinstance(formula, sympy.Add):
        return sympy.And(*map(switched, formula.args))
    factor, rest = formula.as_coeff_Mul()
    if factor <= LOW and isinstance(rest, sympy.Piecewise) and all(part in (0, 1) for part, _ in rest.args):
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
    return node if len(index) == 2 and index[1] == K and index[0] in (B, 0) else None


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
