"""Update: `torch.cat([past, new], dim)` whose result is returned by the graph: HF DynamicCache, tuple caches, module
attributes.

`past` is a graph input, or a tensor without elements (the first call). Refuses: the new tokens first, a past that the
graph computes, more than two parts.
Concatenations that are not caches (RoPE's rotate_half) are not returned by the graph, so they are nobody's business.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.match.calls import argument, call_name, example
from kvpass.match.dataflow import Flow
from kvpass.match.miss import Miss
from kvpass.match.shapes import is_empty, normal_dim, shape_of
from kvpass.site import Update
from kvpass.terms import CacheForm


class ConcatUpdate:
    name = "cat"

    def match(self, node: fx.Node, flow: Flow) -> Update | None:
        """The update at a `cat` that the graph returns.

        Raises:
            Miss: NEW_FIRST or PAST_NOT_INPUT.
        """
        if call_name(node) != "cat" or node not in flow.outputs:
            return None
        parts = argument(node, 0, "tensors")
        if (
            len(parts) != 2
            or not all(isinstance(part, fx.Node) for part in parts)
            or not example(node).is_floating_point()
        ):
            return None
        past, new = parts
        form, past = self._form(node, past, new)
        axis = normal_dim(argument(node, 1, "dim", 0), len(shape_of(node)))
        return Update(node=node, new=new, past=past, axis=axis, form=form, pattern=self.name)

    def _form(self, node: fx.Node, past: Any, new: Any) -> tuple[CacheForm, fx.Node | None]:
        if is_empty(shape_of(past)):
            return CacheForm.EMPTY, None
        if past.op == "placeholder":
            return CacheForm.CONCAT, past
        if new.op == "placeholder":
            raise Miss(Reason.NEW_FIRST, node, f"cat([{past.name}, {new.name}]): the input comes second")
        raise Miss(Reason.PAST_NOT_INPUT, node, f"{past.name} is computed in the graph")
