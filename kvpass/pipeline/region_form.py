"""What a stretch of a graph computes, with names, places and size symbols left out: equal forms, equal code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from kvpass.graph.calls import example

SCALARS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (int, bool, str, bytes, complex, type(None), type(Ellipsis), type)
_TORCH_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Form:
    """A stretch of a graph as a function.

    Attributes:
        key: hashable; two stretches with equal keys compute the same of their inputs, as far as code compiled for the
            one is right for the other: the same calls, wiring and constants, inputs equal in dtype, device, sizes,
            strides and sharing of memory, where sizes that change may be other symbols, one for one.
        nodes: in order.
        inputs: nodes whose values it reads, in order of first sight, and those that tell a size symbol.
        outputs: its nodes that others read.
        symbols: free symbols of the inputs' sizes in order of first sight.
    """

    key: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    symbols: tuple[Any, ...]


def form_of(nodes: Sequence[fx.Node], sizes: Mapping[Any, fx.Node], dead: Set[fx.Node] = frozenset()) -> Form:
    """The form of consecutive nodes of a graph whose values carry fake examples.

    Args:
        sizes: for each size symbol of the graph, an input that is that symbol.
        dead: nodes of the graph that do not count as readers.
    """
    return _Writer(nodes).form(sizes, dead)


def is_constant(node: fx.Node) -> bool:
    """Is the value of a node a Python constant, known while tracing?"""
    return node.op != "placeholder" and type(example(node)) in (int, float, bool, str)


class _Writer:
    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = tuple(nodes)
        self.inside = {node: at for at, node in enumerate(nodes)}
        self.inputs: dict[fx.Node, int] = {}
        self.symbols: dict[Any, Any] = {}
        self.told: set[Any] = set()
        self.memory: dict[int, set[int]] = {}

    def form(self, sizes: Mapping[Any, fx.Node], dead: Set[fx.Node]) -> Form:
        calls = tuple(map(self._call, self.nodes))
        given = [self._given(node) for node in self.inputs]
        for symbol in [s for s in self.symbols if s not in self.told]:
            node = sizes.get(symbol)
            self.inputs.setdefault(node, len(self.inputs)) if node is not None else given.append(("untold", symbol))
            given.append(self._size(symbol))
        outside = (n for n in self.nodes if not n.users.keys() <= self.inside.keys() | dead)
        outputs = tuple(n for n in outside if not is_constant(n))
        shared = tuple(sorted(tuple(sorted(one)) for one in self.memory.values() if len(one) > 1))
        ranges = tuple(self._range(symbol) for symbol in self.symbols)
        key = (calls, tuple(given), tuple(self.inside[n] for n in outputs), shared, ranges)
        return Form(key, self.nodes, tuple(self.inputs), outputs, tuple(self.symbols))

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if node.op in ("get_attr", "call_module"):
            target = id(_attribute(node))
        return node.op, target, self._value(node.args), self._value(node.kwargs)

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, (tuple, list)):
            return type(value), *map(self._value, value)
        if isinstance(value, dict):
            return dict, *((name, self._value(one)) for name, one in value.items())
        if isinstance(value, slice):
            return slice, *map(self._value, (value.start, value.stop, value.step))
        if type(value) is float:  # 0.0 equals -0.0, and nan not itself
            return float, repr(value)
        if isinstance(value, _TORCH_CONSTANTS) or type(value) in _CONSTANTS:
            return type(value), value
        return object, id(value)

    def _node(self, node: fx.Node) -> Any:
        if node in self.inside:
            return "made", self.inside[node]
        if is_constant(node):
            return self._value(example(node))
        return "given", self.inputs.setdefault(node, len(self.inputs))

    def _given(self, node: fx.Node) -> Any:
        value = example(node)
        if isinstance(value, SCALARS):
            return type(value), self._size(value)
        if type(value) is not FakeTensor or value.layout is not torch.strided:
            return object, id(value)
        place = self.memory.setdefault(value.untyped_storage()._cdata, set())
        if not any(example(other) is value for other in self.inputs if self.inputs[other] in place):
            place.add(self.inputs[node])
        facts = value.dtype, value.device, value.requires_grad, value.is_conj(), value.is_neg()
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return torch.Tensor, len(value.shape), *facts, *map(self._size, sizes)

    def _size(self, size: Any) -> Any:
        """A size with the graph's symbols numbered in order of first sight."""
        if isinstance(size, int):
            return size
        expr = size.node.expr if isinstance(size, SCALARS) else size
        if expr.is_Symbol:
            self.told.add(expr)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self.symbols:
                import sympy  # type: ignore[import-untyped]  # it has no types

                self.symbols[symbol] = sympy.Symbol(f"size{len(self.symbols)}", **symbol.assumptions0)
        return expr.xreplace(self.symbols)

    def _range(self, symbol: Any) -> Any:
        """What is known of a size for all calls."""
        for node in self.inputs:
            value = example(node)
            if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
                return str(value.fake_mode.shape_env.var_to_range.get(symbol))
        return None


def _attribute(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value
