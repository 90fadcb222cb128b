"""Numbers in traced graphs: constants that are nodes, and products with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.shapes import shape_of

PRODUCTS = frozenset({"mul", "multiply", "imul", "mul_"})
QUOTIENTS = frozenset({"truediv", "div", "divide", "true_divide", "div_", "itruediv"})
_FACTORS = PRODUCTS | QUOTIENTS
NO_WEIGHT = -1e4
"""A logit this low, or lower, hides its key: probability 0 in float32 beside any key that is seen. Not yet padding to
the ops: their threshold is lower in every dtype, float16 too.
"""

_CONSTANTS = frozenset({"tensor", "scalar_tensor", "as_tensor", "_tensor_constant"})


def number(value: Any) -> float | None:
    """The number that a value is in every call: a literal, or a node that makes a tensor of one literal."""
    value = constant(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or shape_of(value) not in ((), (1,)):
        return None
    name = call_name(value)
    if any(changes(user) for user in value.users):
        return None
    if name in _CONSTANTS:
        given = value.args[0] if value.args else None
        return number(given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given)
    if name in ("full", "new_full"):
        return number(argument(value, 1 if name == "full" else 2, "fill_value"))
    if name in ("to", "clone", "type_as", "float") and isinstance(operand(value), fx.Node):
        return number(operand(value))
    if name == "sqrt":
        root = number(operand(value))
        return None if root is None or root < 0 else float(root**0.5)
    return None


def constant(value: Any) -> Any:
    """A float that `torch.compile(dynamic=True)` made symbolic, as what it is in this call, with Dynamo's guard that it
    stays so; anything else, also what is computed from a length, as it is.
    """
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    said = example(value) if isinstance(value, fx.Node) else None
    if not isinstance(said, torch.SymFloat) or not said.node.has_hint():
        return value
    floats = all(symbol_is_type(symbol, SymT.FLOAT) for symbol in said.node.expr.free_symbols)
    return float(said) if floats else value


def factor_of(node: fx.Node) -> float | None:
    """The number that a node multiplies one tensor by; None if it does something else."""
    name = call_name(node)
    if name not in _FACTORS or len(node.args) < 2 or node.kwargs.get("rounding_mode") is not None:
        return None
    left, right = number(node.args[0]), number(node.args[1])
    if name in QUOTIENTS:
        return 1.0 / right if right else None
    return right if right is not None else left
