"""Calls of a decode graph that read how long the past is, rewritten to read it from the device, or left where only the
size of what they make depends on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, source_line
from kvpass.lowering.static_sizes import NotStatic, Steps

POINTWISE = frozenset(
    {
        *("add", "sub", "rsub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "floordiv", "mod", "minimum"),
        *("iadd", "isub", "maximum", "remainder", "clamp", "floor_divide", "less", "less_equal", "greater"),
        *("and_", "or_", "xor", "invert", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or"),
        *("bitwise_not", "iand", "ior", "where", "masked_fill", "__invert__", "exp", "truediv"),
        *("to", "bool", "float", "long", "int", "half", "bfloat16", "double", "type", "type_as"),
        *("clone", "contiguous", "detach", "ones_like", "zeros_like", "full_like"),
    }
)
"""Each element of the result is made of the elements at its place."""

SHAPED = frozenset({"expand", "reshape", "ones", "zeros", "empty", "new_ones", "new_zeros", "new_empty", "new_full"})
"""A size among the arguments is a size of the result."""

MOVED = frozenset({"unsqueeze", "squeeze", "transpose", "permute", "movedim", "cumsum"})
"""Columns stay columns, each made of those up to its place."""

EXACT = (torch.float32, torch.float64)
"""Floats that hold every position exactly."""


class StaticCalls:
    """Rewrites calls one by one, in the graph's order.

    Args:
        at: int32 [1], the position on the device.
    """

    def __init__(self, graph: fx.Graph, steps: Steps, at: fx.Node) -> None:
        self.graph, self.steps, self.at = graph, steps, at
        self.places: dict[int, fx.Node] = {}
        self.ops: dict[str, Callable[[fx.Node], None]] = {
            "decode_attend": lambda node: self._op(node, 5, on_device=True),
            "token_bounds": lambda node: self._op(node, 1, on_device=True),
            "written": self._written,
            "arrivals": lambda node: self._op(node, 3, on_device=False),
            "arange": self._arange,
            "getitem": self._getitem,
            "narrow": self._narrow,
            "select": self._select,
            "full": self._full,
            "tril": self._tril,
        }

    def rewrite(self, node: fx.Node) -> None:
        """One call that gives a tensor.

        Raises:
            NotStatic: what it does with the length, or with tensors that are as long as all tokens.
        """
        reads = any(self.steps.is_step(value) for value in node.all_input_nodes)
        if not reads and not any(map(self.steps.grows, node.all_input_nodes)):
            return
        name = call_name(node)
        if name in self.ops:
            self.ops[name](node)
        elif name in POINTWISE:
            self._pointwise(node)
        elif name in SHAPED or (name in MOVED and not reads):
            self._shaped(node)
        else:
            raise self._no(node, "reads the length" if reads else "reads all columns of a tensor that grows")

    def refuse_if_read(self, node: fx.Node) -> None:
        """Of a call that gives no tensor.

        Raises:
            NotStatic: it reads the length.
        """
        if any(self.steps.is_step(one) or self.steps.grows(one) for one in node.all_input_nodes):
            raise self._no(node, "reads the length")

    def _no(self, node: fx.Node, what: str) -> NotStatic:
        line = source_line(node)
        return NotStatic(f"{call_name(node) or node.name} {what}" + (f", {line}" if line else ""))

    def _op(self, node: fx.Node, place: int, on_device: bool) -> None:
        """An op of ours takes the position from the device; it looks at no column behind the token."""
        for one in filter(self.steps.grows, node.all_input_nodes):
            if self.steps.columns(one) != [example(one).dim() - 1]:
                raise self._no(node, "is given a mask that grows in another axis than its last")
        node.update_arg(place, 0)
        if on_device:
            node.update_kwarg("at", self.at)

    def _written(self, node: fx.Node) -> None:
        """All of a buffer's mask, checked on the device unless the words of its readers hide what is behind."""
        if not node.kwargs.get("check", True):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node
            return
        self._op(node, 1, on_device=True)
        with example(self.at).fake_mode:
            node.meta["example_value"] = torch.empty_like(example(node.args[0]))  # type: ignore[arg-type]  # a node

    def _arange(self, node: fx.Node) -> None:
        start, end = (0, node.args[0]) if len(node.args) == 1 else node.args[:2]
        if len(node.args) > 2 or not set(node.kwargs) <= {"device", "dtype", "pin_memory", "requires_grad", "layout"}:
            raise self._no(node, "reads the length")
        if not self.steps.is_step(start):
            if not self.steps.is_step(end) or not self.steps.is_end(example(end)):  # type: ignore[arg-type]  # a node
                raise self._no(node, "is as long as the past")
            return
        if not self.steps.is_step(end):
            raise self._no(node, "begins at the length")
        first, last = self._offset(start), self._offset(end)
        with self.graph.inserting_before(node):
            count = self._new(torch.arange, last - first, **node.kwargs)
            if not example(count).is_floating_point() or example(count).dtype in EXACT:
                node.replace_all_uses_with(self._new(operator.add, count, self._here(first)))
                return
        raise self._no(node, "counts positions in a dtype that does not hold them")

    def _pointwise(self, node: fx.Node) -> None:
        tensors = [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]
        for one in tensors:
            self.steps.columns(one)
        if call_name(node) in ("full_like", "masked_fill", "clamp") and any(map(self.steps.is_step, node.args)):
            raise self._no(node, "reads the length")
        values = [n for n in (*node.args, *node.kwargs.values()) if self.steps.is_step(n)]
        if not values:
            return
        dtypes = [example(n).dtype for n in tensors]
        if any((d.is_floating_point and d not in EXACT) or d.is_complex for d in dtypes):
            raise self._no(node, "reads the length in a dtype that does not hold it")
        with self.graph.inserting_before(node):
            for value in values:
                node.replace_input_with(value, self._here(self._offset(value)))  # type: ignore[arg-type]  # a node

    def _shaped(self, node: fx.Node) -> None:
        """Sizes stay: the result is as long as all tokens, and no column moves."""
        for one in node.all_input_nodes:
            if self.steps.is_step(one) and not self.steps.is_end(example(one)):
                raise self._no(node, "makes a tensor as long as the past")
            if self.steps.grows(one) and len(self.steps.columns(one)) != len(self.steps.columns(node)):
                raise self._no(node, "reads all columns of a tensor that grows")
        self.steps.columns(node)
        if call_name(node) == "new_full" and self.steps.is_step(argument(node, 2, "fill_value")):
            raise self._no(node, "reads the length")

    def _full(self, node: fx.Node) -> None:
        value = argument(node, 1, "fill_value")
        sizes = [n for n in node.all_input_nodes if n is not value and self.steps.is_step(n)]
        if sizes or not self.steps.is_step(value) or example(node).dtype not in (torch.int64, torch.int32):
            return self._shaped(node)
        with self.graph.inserting_before(node):
            zeros = self._new(torch.full, node.args[0], 0, **{"dtype": example(node).dtype, **node.kwargs})
            node.replace_all_uses_with(self._new(operator.add, zeros, self._here(self._offset(value))))

    def _tril(self, node: fx.Node) -> None:
        """Of a bool matrix of one row: columns up to the diagonal."""
        matrix, diagonal = node.args[0], argument(node, 1, "diagonal", 0)
        shape = example(node).shape
        if not self.steps.is_step(diagonal) or example(node).dtype is not torch.bool or shape[-2] != 1:
            raise self._no(node, "reads the length")
        self.steps.columns(node)
        with self.graph.inserting_before(node):
            columns = self._new(torch.arange, self._new(torch.Tensor.size, matrix, -1), device=example(node).device)
            below = self._new(operator.le, columns, self._here(self._offset(diagonal)))
            node.replace_all_uses_with(self._new(operator.and_, matrix, below))

    def _narrow(self, node: fx.Node) -> None:
        table, axis, start, count = node.args
        if self.steps.is_step(count) or not self.steps.is_step(start) or self.steps.grows(table):  # type: ignore[arg-type]
            raise self._no(node, "reads a part that grows")
        with self.graph.inserting_before(node):
            node.replace_all_uses_with(self._rows(table, axis, self._offset(start), count))

    def _select(self, node: fx.Node) -> None:
        table, axis, place = node.args
        if not self.steps.is_step(place) or self.steps.grows(table):  # type: ignore[arg-type]  # a node
            raise self._no(node, "reads one column of a tensor that grows")
        with self.graph.inserting_before(node):
            rows = self._rows(table, axis, self._offset(place), 1)
            node.replace_all_uses_with(self._new(torch.select, rows, axis, 0))

    def _getitem(self, node: fx.Node) -> None:
        """Columns stay whole, or are picked by indices; `x[P]` and `x[P:P + 1]` of a table are rows of it."""
        table, index = node.args
        parts = list(index) if isinstance(index, tuple) else [index]
        sized = [at for at, part in enumerate(parts) if part is not None and part is not Ellipsis]
        shape, rest = example(table).shape, len(example(table).shape) - len(sized)  # type: ignore[arg-type]  # a node
        axis = 0
        with self.graph.inserting_before(node):
            for at, part in enumerate(parts):
                if part is Ellipsis:
                    axis += rest
                elif part is not None:
                    table, parts[at] = self._part(node, table, axis, part, self.steps.is_made_of_steps(shape[axis]))
                    axis += 1
        node.args = (table, tuple(parts))

    def _part(self, node: fx.Node, table: Any, axis: int, part: Any, grows: bool) -> tuple[Any, Any]:
        """One axis of an index."""
        ends = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
        whole = grows and isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
        if whole and (part.stop is None or (self.steps.is_step(part.stop) and self._offset(part.stop) == 1)):
            return table, slice(None)
        if grows and any(isinstance(end, int) and end < 0 for end in ends):  # counted from the token
            if ends in [(-1,), (-1, None, None)]:
                return self._rows(table, axis, 0, 1), 0 if ends == (-1,) else slice(None)
            raise self._no(node, "reads a part that grows")
        if not any(map(self.steps.is_step, ends)):
            if grows and isinstance(part, slice) and part.stop is None:
                raise self._no(node, "reads a part that grows")
            return table, part
        if not isinstance(part, slice):
            return self._rows(table, axis, self._offset(part), 1), 0
        if not (self.steps.is_step(part.start) and self.steps.is_step(part.stop) and part.step in (None, 1)):
            raise self._no(node, "reads a part that grows")
        first = self._offset(part.start)
        return self._rows(table, axis, first, self._offset(part.stop) - first), slice(None)

    def _rows(self, table: Any, axis: Any, first: int, count: Any) -> fx.Node:
        """Rows of a table from P + first on."""
        index = self._here(first, flat=True)
        if count != 1:
            steps = self._new(torch.arange, count, device=example(table).device)
            index = self._new(operator.add, steps, index)
        return self._new(torch.index_select, table, axis, index)

    def _offset(self, value: Any) -> int:
        return self.steps.offset(example(value))

    def _here(self, more: int, flat: bool = False) -> fx.Node:
        """P + more on the device: int64, of no axes, so that it counts as a number where dtypes meet; flat: [1]."""
        if more not in self.places:
            with self.graph.inserting_after(self.at):
                place = self._new(torch.Tensor.reshape, self.at, ())
            with self.graph.inserting_after(place):
                place = self._new(torch.Tensor.long, place)
            if more:
                with self.graph.inserting_after(place):
                    place = self._new(operator.add, place, more)
            self.places[more] = place
        return self._new(torch.Tensor.reshape, self.places[more], (1,)) if flat else self.places[more]

    def _new(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), example)
        with example(self.at).fake_mode:
            node.meta["example_value"] = target(*given, **named)
        node.meta["kvpass"] = {"state": "at"}
        return node
