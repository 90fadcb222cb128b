"""An operator has one name, whether the trace has it as a function or as a method."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from kvpass.graph.calls import call_name, called, changes

TWO = ["eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "iadd", "imul"]


def node(kind: str, target: object, sides: int) -> fx.Node:
    graph = fx.Graph()
    operands = tuple(graph.placeholder(name) for name in "ab"[:sides])
    return graph.create_node(kind, target, operands)  # type: ignore[arg-type]  # a name or a function


@pytest.mark.parametrize("name", [*TWO, "and_", "or_", "xor", "invert", "neg", "abs"])
def test_a_method_is_called_like_its_function(name: str) -> None:
    """Compared by what Python itself says: `operator.eq` is `__eq__` of the first side."""
    sides = 1 if name in ("invert", "neg", "abs") else 2
    function = getattr(operator, name)
    method = node("call_method", f"__{name.rstrip('_')}__", sides)
    assert call_name(method) == call_name(node("call_function", function, sides)) == name
    assert changes(method) == name.startswith("i") * (name not in ("invert",))
    values = [torch.tensor([5, 3]), torch.tensor([2, 3])][:sides]
    expected = function(*(v.clone() for v in values))
    assert torch.equal(called(method, [v.clone() for v in values], {}), expected)


def test_items() -> None:
    assert call_name(node("call_method", "__getitem__", 2)) == "getitem"
    write = node("call_method", "__setitem__", 2)
    assert call_name(write) == "setitem"
    assert changes(write)
