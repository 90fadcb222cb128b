"""What one element of a tensor is, as a formula of its own indices.

Masks are arithmetic on counters, comparisons, and lookups in small inputs. Asked from the mask upwards, each node says
what its element at some indices is by the elements of what it is made of; a node that is not known here, or an input,
is an unknown function of the indices. So formulas are exact: what follows from one holds for the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from kvpass.graph.aliases import aliases
from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.shapes import is_one, shape_of

Index = tuple[Any, ...]
"""sympy expressions, one for each axis."""

LIMIT = 60
"""Operations in a row between a mask and what it is made of."""


class Element(sympy.Function):  # type: ignore[misc]  # it has no types
    """An element of a tensor that is not looked into: `Element(name, i, j, ..)`."""


class Elements:
    """Elements of the nodes of one graph.

    Args:
        steps: by the name of a call, what an element of its result is; None for what is not known.

    Attributes:
        nodes: tensors that formulas read, by the name in `Element`.
    """

    def __init__(self, steps: Mapping[str, Callable[[At], Any]]) -> None:
        self.steps = steps
        self.nodes: dict[str, fx.Node] = {}
        self.changed: dict[fx.Node, bool] = {}

    def at(self, value: Any, index: Index, depth: int = 0) -> Any:
        """The element of a node, or of a number, at an index: a boolean formula if the tensor is bool."""
        tensor = example(value) if isinstance(value, fx.Node) else value
        if not isinstance(tensor, torch.Tensor):
            return scalar(tensor)
        index = tuple(sympy.Integer(0) if is_one(n) else i for i, n in zip(index, tensor.shape, strict=True))
        step = self.steps.get(call_name(value))
        if value not in self.changed:
            self.changed[value] = is_changed(value)
        if step is None or depth > LIMIT or self.changed[value]:
            return self.read(value, index)
        try:
            found = step(At(self, value, index, depth + 1))
        except (TypeError, ValueError, AttributeError, IndexError):  # a spelling that the step does not know
            found = None
        return self.read(value, index) if found is None else found

    def read(self, node: fx.Node, index: Index) -> Any:
        """Not looked into."""
        self.nodes[node.name] = node
        element = Element(sympy.Symbol(node.name), *index)
        return sympy.Ne(element, 0) if example(node).dtype == torch.bool else element


def is_changed(node: fx.Node) -> bool:
    """Whether something may be written into a tensor's memory: then its elements depend on when they are read."""
    return any(changes(user) and operand(user) is alias for alias in aliases(node, casts=True) for user in alias.users)


def scalar(value: Any) -> Any:
    """A Python number, bool or SymInt, or the node of one, as sympy has it."""
    value = example(value) if isinstance(value, fx.Node) else value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.expr
    return sympy.true if value is True else sympy.false if value is False else sympy.sympify(value)


class At:
    """A node of which an element is asked."""

    def __init__(self, elements: Elements, node: fx.Node, index: Index, depth: int) -> None:
        self.elements, self.node, self.index, self.depth = elements, node, index, depth

    @property
    def bool(self) -> bool:
        return bool(example(self.node).dtype == torch.bool)

    def of(self, value: Any, index: Index | None = None) -> Any:
        """The element of an operand: at the same index, as far as it is not broadcast, or at another."""
        index = self.index if index is None else index
        axes = len(shape_of(value))
        return self.elements.at(value, index[len(index) - axes :], self.depth)

    def given(self, place: int, name: str, default: Any = None) -> Any:
        return argument(self.node, place, name, default)


def truth(formula: Any) -> Any:
    """A number as a condition."""
    if is_truth(formula):
        return formula
    if isinstance(formula, sympy.Piecewise):
        return _chosen([(truth(part), condition) for part, condition in formula.args])
    return sympy.Ne(formula, 0)


def amount(formula: Any) -> Any:
    """A condition as 0 or 1."""
    return sympy.Piecewise((1, formula), (0, True)) if is_truth(formula) else formula


def is_truth(formula: Any) -> bool:
    return isinstance(formula, sympy.logic.boolalg.Boolean) and not isinstance(formula, sympy.Symbol)


def _chosen(parts: list[tuple[Any, Any]]) -> Any:
    """Conditions by cases, as one condition."""
    found, before = sympy.false, sympy.true
    for part, condition in parts:
        found = sympy.Or(found, sympy.And(before, condition, part))
        before = sympy.And(before, sympy.Not(condition))
    return found
