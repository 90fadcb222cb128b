"""Which sizes of a decode graph grow from step to step: those of pasts, and what is one longer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import call_name, example
from kvpass.plan.plan import Plan
from kvpass.runtime.steps.buffer_position import POSITION
from kvpass.terms import CacheForm


class NotStatic(Exception):
    """Why a decode graph has no static form."""


class Steps:
    """The symbols of a graph whose values grow by one with each step.

    Attributes:
        position: the symbol of where the token stands, P.
        offsets: of each symbol that is P plus a constant in every call, that constant.
        guessed: sizes among them that are no length of a past, each with its constant: to be checked at each call.
    """

    def __init__(self, position: Any, offsets: dict[Any, int], guessed: Sequence[tuple[Any, int]] = ()) -> None:
        self.position, self.offsets, self.guessed = position, offsets, tuple(guessed)

    def is_made_of_steps(self, value: Any) -> bool:
        """Whether a number (or a size) changes from step to step."""
        expr = _expr(value)
        return expr is not None and bool(expr.free_symbols & self.offsets.keys())

    def is_step(self, node: Any) -> bool:
        """Whether a node is a number that changes from step to step."""
        return isinstance(node, fx.Node) and self.is_made_of_steps(example(node))

    def is_number(self, node: fx.Node) -> bool:
        """Whether a node is a number at all."""
        return isinstance(example(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))

    def offset(self, value: Any) -> int:
        """c of a number that is P + c.

        Raises:
            NotStatic: it is another function of P.
        """
        import sympy  # type: ignore[import-untyped]  # it has no types

        expr = _expr(value)
        found = expr.xreplace({s: self.position + c for s, c in self.offsets.items() if s != self.position})
        more = sympy.expand(found - self.position)
        if not more.is_Integer:
            raise NotStatic(f"the number {expr} depends on the length")
        return int(more)

    def is_end(self, size: Any) -> bool:
        """Whether a size is P + 1: all tokens."""
        try:
            return self.is_made_of_steps(size) and self.offset(size) == 1
        except NotStatic:
            return False

    def grows(self, node: fx.Node) -> bool:
        """Whether a node is a tensor with a size that changes from step to step."""
        value = example(node)
        return isinstance(value, torch.Tensor) and any(map(self.is_made_of_steps, value.shape))

    def columns(self, node: fx.Node) -> list[int]:
        """Axes of a tensor that are as long as all tokens.

        Raises:
            NotStatic: an axis grows in another way.
        """
        shape = example(node).shape
        for size in shape:
            if self.is_made_of_steps(size) and not self.is_end(size):
                raise NotStatic(f"{node.name} is of shape {list(map(str, shape))}")
        return [axis for axis, size in enumerate(shape) if self.is_end(size)]


def steps_of(inputs: Sequence[fx.Node], states: Sequence[fx.Node], graph: fx.Graph, plan: Plan) -> Steps:
    """The growing sizes of a lowered graph.

    Raises:
        NotStatic: a position is no plain size.
    """
    positions = [n.args[5] for n in graph.nodes if call_name(n) == "decode_attend"]
    symbols: list[Any] = [_expr(example(p)) if isinstance(p, fx.Node) else None for p in positions]
    if None in symbols or not all(symbol.is_Symbol for symbol in symbols):
        raise NotStatic("where its token stands is no plain size")
    first: Any = example(positions[0])
    offsets = dict.fromkeys(symbols, 0)
    fixed = {s for node in states for size in example(node).shape for s in _symbols(size)}
    fixed |= {s for one in plan.sites for s in _symbols(one.site.dims["B"])}
    pasts = {s for size in _past_sizes(inputs, plan) for s in _symbols(size)} - fixed
    offsets.update(dict.fromkeys(pasts, 0))
    guessed = []
    if not any(_is_buffer(one, inputs) for one in positions):
        for size in _sizes(inputs):
            symbol = _expr(size)
            if symbol in offsets or symbol in fixed or not symbol.is_Symbol:
                continue
            if size.node.hint - first.node.hint == 1:
                offsets[symbol] = 1
                guessed.append((size, 1))
    return Steps(symbols[0], offsets, guessed)


def _past_sizes(inputs: Sequence[fx.Node], plan: Plan) -> Iterator[Any]:
    """Lengths of the pasts of keys and values that grow."""
    names = {n.name: n for n in inputs}
    for one in plan.sites:
        for half in (one.site.key, one.site.value):
            past = half.update.past
            if past is not None and past.name in names and half.update.form is not CacheForm.BUFFER:
                yield example(names[past.name]).shape[half.layout.token_axis]


def _is_buffer(position: Any, inputs: Sequence[fx.Node]) -> bool:
    return position in inputs and str(position.target) == f"kvpass_{POSITION.name}"


def _sizes(inputs: Sequence[fx.Node]) -> Iterator[Any]:
    for node in inputs:
        value = example(node)
        sizes = [value] if isinstance(value, torch.SymInt) else value.shape if isinstance(value, torch.Tensor) else []
        yield from (size for size in sizes if isinstance(size, torch.SymInt))


def _symbols(size: Any) -> Any:
    expr = _expr(size)
    return expr.free_symbols if expr is not None else ()


def _expr(value: Any) -> Any:
    """The formula of a symbolic number; None of any other value."""
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None
