"""Elements of reshaped tensors as formulas, against the tensors themselves."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import sympy
import torch
from torch import fx

from kvpass.graph.element_steps import STEPS
from kvpass.graph.elements import Elements

SHAPES = [
    ((4, 5), (2, 2, 5)),
    ((3, 8), (3, 2, 4)),
    ((12, 1, 5), (2, 3, 2, 5)),
    ((2, 4, 2), (2, 2, 2, 2)),
    ((2, 3), (1, 2, 1, 3)),
    ((6, 4), (6, 2, 2)),
    ((1, 6), (2, 3)),
]


def captured(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[fx.Node, torch.Tensor]:
    """A tensor of known elements, reshaped in a graph, and its value."""
    graph = fx.Graph()
    count = torch.Size(before).numel()
    numbers = graph.call_function(torch.arange, (count,))
    reshaped = graph.call_method("reshape", (numbers, *before))
    node = graph.call_method("reshape", (reshaped, *after))
    graph.output(node)
    value = torch.arange(count)
    for one, shape in ((numbers, (count,)), (reshaped, before), (node, after)):
        one.meta["example_value"] = value.reshape(shape)
    return node, value.reshape(after)


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_one_axis_becomes_several(before: Any, after: Any) -> None:
    node, value = captured(before, after)
    for index in product(*map(range, after)):
        found = Elements(STEPS).at(node, tuple(map(sympy.Integer, index)))
        if len([n for n in before if n > 1]) == 1 or found.is_number:
            assert found == int(value[index])
        else:  # axes of several are not taken apart again: the inner tensor is read
            inner = Elements(STEPS).at(node.args[0], _place(before, int(value[index])))
            assert found == inner


def _place(shape: tuple[int, ...], at: int) -> tuple[Any, ...]:
    return tuple(sympy.Integer(int(i)) for i in torch.unravel_index(torch.tensor(at), shape))


def test_axes_that_become_one_are_not_known() -> None:
    node, _ = captured((2, 3), (6,))
    assert Elements(STEPS).at(node, (sympy.Integer(4),)) == Elements(STEPS).read(node, (sympy.Integer(4),))
