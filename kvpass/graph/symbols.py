"""Symbolic sizes: reading their values from a call's inputs, and making new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example

_NUMBER = count()


class SizeReader:
    """Turns ints and SymInts of a traced graph into functions of the call's inputs."""

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self.known: dict[Any, tuple[int, int | None]] = {}
        self.read_by: dict[Any, Callable[[Sequence[Any]], int]] = {}
        for at, node in enumerate(inputs):
            value = example(node)
            if isinstance(value, torch.SymInt):
                self.known.setdefault(value.node.expr, (at, None))
            elif isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self.known.setdefault(size.node.expr, (at, dim))

    def read(self, size: Any) -> Callable[[Sequence[Any]], int]:
        """A function from the graph's inputs to the value of `size` in that call: one for all sites, each of which asks
        it in each call.
        """
        key = size if isinstance(size, int) else size.node.expr
        if key not in self.read_by:
            self.read_by[key] = self._reader(size)
        return self.read_by[key]

    def _reader(self, size: Any) -> Callable[[Sequence[Any]], int]:
        if isinstance(size, int):
            return lambda args: size
        expr = size.node.expr
        if expr in self.known:
            return self._at(*self.known[expr])
        import sympy  # type: ignore[import-untyped]  # it has no types

        symbols = sorted(expr.free_symbols, key=str)
        parts = [self._at(*self.known[symbol]) for symbol in symbols]
        formula = sympy.lambdify(
            symbols, expr, modules=[{"FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b}, "math"]
        )
        return lambda args: int(formula(*(part(args) for part in parts)))

    def _at(self, place: int, dim: int | None) -> Callable[[Sequence[Any]], int]:
        return (lambda args: int(args[place])) if dim is None else (lambda args: int(args[place].shape[dim]))


def hinted(args: Sequence[Any]) -> list[Any]:
    """Inputs with the values that their symbols stand for in the call that is compiled: `int` of a symbol would guard
    on it, and each other value then be a graph of its own. None if a symbol has no value yet.
    """
    return [arg.node.hint if isinstance(arg, torch.SymInt) else arg for arg in args]


def free_size(shape_env: Any, name: str, hint: int = 4093) -> Any:
    """A size that changes from call to call without a guard; it may only reach opaque ops."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(f"{name}_{next(_NUMBER)}")
    symbol = shape_env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)
