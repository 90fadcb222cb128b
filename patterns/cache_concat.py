"""Update: `torch.cat([past, new], dim)` whose result is returned by the graph: HF DynamicCache, tuple caches, module
attributes.

`past` is a graph input, or a tensor without elements (the first call). Refuses: the new tokens first, a past that the
graph computes, more than two parts.
Concatenations that are not caches are not returned by the graph, or hold no input: RoPE's halves, heads, weights.
"""

from __future__ import annotations

from typing import Any

from kvpass.patterns.cache_padded import padded_sum
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, example, is_input
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import from_input, grows
from kvpass.graph.shapes import is_empty, normal_dim, shape_of
from kvpass.sites.site import Update
from kvpass.terms import CacheForm


class ConcatUpdate:
    name = "cat"

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at a `cat` that the graph returns.

        Raises:
            Miss: NEW_FIRST, PAST_NOT_INPUT or UNSUPPORTED_UPDATE.
        """
        if node not in flow.outputs:
            return None
        padded = padded_sum(node)
        if padded is not None:
            return Update(node, padded.new, padded.past, padded.axis, CacheForm.CONCAT, self.name, inner=padded.inner)
        if call_name(node) != "cat":
            return None
        parts = argument(node, 0, "tensors")
        if not all(isinstance(part, fx.Node) for part in parts) or not example(node).is_floating_point():
            return None
        if len(parts) != 2:
            if grows(node):
                raise Miss(Reason.UNSUPPORTED_UPDATE, node, f"cat of {len(parts)} parts")
            return None
        past, new = parts
        if not is_empty(shape_of(past)) and not from_input(past) and not from_input(new):
            return None
        axis = normal_dim(argument(node, 1, "dim", 0), len(shape_of(node)))
        if axis == len(shape_of(node)) - 1 and not is_input(past):
            return None
        form, past = self._form(node, past, new)
        return Update(node=node, new=new, past=past, axis=axis, form=form, pattern=self.name)

    def _form(self, node: fx.Node, past: Any, new: Any) -> tuple[CacheForm, fx.Node | None]:
        if is_empty(shape_of(past)):
            return CacheForm.EMPTY, None
        if is_input(past):
            return CacheForm.CONCAT, past
        if is_input(new):
            raise Miss(Reason.NEW_FIRST, node, f"cat([{past.name}, {new.name}]): the input comes second")
        raise Miss(Reason.PAST_NOT_INPUT, node, f"{past.name} is computed in the graph")
