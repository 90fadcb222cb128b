"""Comparisons of positions in masks: which side counts keys, which queries, and what it means that one is larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.numbers import number
from kvpass.graph.shapes import is_one, shape_of

REVERSED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
"""The comparison with its sides exchanged."""
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_SHAPES = frozenset({"expand", "reshape", "unsqueeze", "squeeze", "transpose", "contiguous", "clone", "repeat"})
_VIEWS = _SHAPES | {"to", "long", "int", "getitem", "slice"}
_SUMS = frozenset({"add", "iadd", "sub", "neg", "abs", "rsub", "min", "max", "clamp", "minimum", "maximum"})
_STEPS = frozenset({"floordiv", "floor_divide", "div", "mul", "mod", "remainder"})
_SOURCES = frozenset({"arange", "cumsum", "sum", "full", "zeros", "new_zeros", "tensor", "size", "sym_size"})
Words = frozenset[str]


def compared(node: fx.Node, keep: bool) -> Words | None:
    """Words for a comparison of positions; None if it compares something else."""
    name, left, right = call_name(node), node.args[0], argument(node, 1, "other")
    name = name if keep else _OPPOSITE[name]
    if not _is_position(left) or not _is_position(right):
        block = name == "eq" and {_side(left), _side(right)} == {"keys", "queries"}
        return frozenset({"block"}) if block else None
    sides = _side(left), _side(right)
    if "distance" in sides:
        at = sides.index("distance")
        return _by_distance((left, right)[at], name if at == 0 else REVERSED[name])
    if sides[0] != "keys":
        name, left, right, sides = REVERSED[name], right, left, (sides[1], sides[0])
    if "keys" not in sides:
        return frozenset({"unknown" if name in ("eq", "ne") else "causal"})  # one query and one key
    return _by_keys(name, right, sides[1], shape_of(node))


def _by_keys(name: str, bound: Any, side: str, shape: tuple[Any, ...]) -> Words | None:
    """`keys < bound`"""
    upper = name in ("lt", "le")
    if name in ("eq", "ne"):
        return frozenset({"block"}) if side == "queries" else None
    if side == "sequence" and _made_by(bound, frozenset({"sum"})):
        return frozenset({"padding"})
    if _made_by(bound, frozenset({"floordiv", "floor_divide"})):
        return frozenset({"block"})
    if side == "one" and (len(shape) < 2 or not is_one(shape[-2])) and number(bound) is not None:
        return frozenset({"bidirectional"}) if upper else frozenset({"unknown"})
    if upper:
        return frozenset({"causal"})
    return frozenset({"window"}) if _made_by(bound, frozenset({"sub"})) or side != "queries" else frozenset({"unknown"})


def _by_distance(node: Any, name: str) -> Words:
    """`queries - keys < n`, `keys - queries < n`, `abs(..) < n`"""
    turned = False
    while call_name(node) in _VIEWS | {"neg", "abs"}:
        if call_name(node) == "abs":
            return frozenset({"window"})
        turned ^= call_name(node) == "neg"
        node = operand(node)
    left = _side(node.args[0]) if node.args else ""
    turned ^= left == "keys"
    name = REVERSED[name] if turned else name
    return frozenset({"causal"}) if name in ("gt", "ge") else frozenset({"window"})


def _side(node: Any) -> str:
    """`keys` varies along the last axis, `queries` along the one before, `distance` along both, `sequence` along the
    first, `one` along none.
    """
    shape = shape_of(node)
    wide = [at - len(shape) for at, size in enumerate(shape) if not is_one(size)]
    if -1 in wide:
        return "distance" if -2 in wide else "keys"
    if -2 in wide and len(shape) > 2:
        return "queries"
    if -2 in wide:
        return "sequence" if _made_by(node, frozenset({"sum"})) else "queries"
    if wide:
        return "sequence"
    return "queries" if len(shape) > 1 else "one"


def _is_position(node: Any) -> bool:
    """A number, or made of counters by adding, subtracting and dividing."""
    queue, seen = [node], set()
    for current in queue:
        if not isinstance(current, fx.Node):
            if number(current) is None and not isinstance(current, torch.SymInt):
                return False
            continue
        value = example(current)
        if isinstance(value, torch.Tensor) and (value.dtype == torch.bool or value.is_complex()):
            return False
        name = call_name(current)
        if name in _SOURCES or not isinstance(value, torch.Tensor):
            continue
        if current.op == "placeholder":
            if value.dtype.is_floating_point or len(value.shape) > 2:
                return False
            continue
        if name not in _VIEWS | _SUMS | _STEPS or len(queue) > 60:
            return False
        seen.add(current)
        queue += [n for n in _data(current) if n not in seen]
    return _counts(node)


def _data(node: fx.Node) -> list[fx.Node]:
    return [operand(node)] if call_name(node) in _VIEWS else node.all_input_nodes


def _counts(node: Any) -> bool:
    """Is there a counter in it? A mask given from outside and compared with a number is none."""
    given = isinstance(node, fx.Node) and len(shape_of(node)) > 0
    return not given or _made_by(node, frozenset({"arange", "cumsum", "sum"})) or _made_by(node, frozenset())


def _made_by(node: Any, names: frozenset[str]) -> bool:
    """Is one of these calls above a value? Without names: an input of one axis, or of positions."""
    queue = [node] if isinstance(node, fx.Node) else []
    for current in queue:
        if call_name(current) in names or (
            not names and current.op == "placeholder" and len(shape_of(current)) < 2 and shape_of(current)
        ):
            return True
        queue += [n for n in current.all_input_nodes if n not in queue][: 60 - len(queue)]
    return False
