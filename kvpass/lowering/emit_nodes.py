"""New nodes of one site, each with its source, its site and its fake value."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx

import kvpass.ops  # noqa: F401  (registers torch.ops.kvpass)
from kvpass.graph.calls import called, example
from kvpass.runtime.step import SharedInput
from kvpass.sites.site import Site


class Rewriting(Protocol):
    """What the emission of a site needs of the rewriting that it is a part of.

    Attributes:
        copy: from nodes of the captured graph to those of the new one.
        masks: what was not proved of masks, over buffers cut to what is written, by what it was made of.
        spans: masks of prompts looked at, by the mask.
        tokens: which columns hold a token, and their bounds, by the captured node, queries and rows of a sequence.
        shared: inputs of the new graph that the plan's sites share.
        values: fake values of emitted nodes, by what they were computed from.
    """

    graph: fx.Graph
    copy: dict[fx.Node, fx.Node]
    values: dict[Any, Any]
    masks: dict[Any, fx.Node]
    spans: dict[Any, fx.Node]
    tokens: dict[Any, tuple[fx.Node, fx.Node]]
    shared: dict[SharedInput, fx.Node]

    def input_of(self, size: Any) -> tuple[fx.Node, int | None] | None:
        """The input of the new graph that has a size, and along which axis; None if there is no such input."""


class Writer:
    """Writes nodes of one site where its graph inserts them."""

    def __init__(self, low: Rewriting, site: Site, core: fx.Node) -> None:
        self.low, self.site, self.core = low, site, core
        self.for_all = False

    @contextmanager
    def early(self, *after: Any) -> Iterator[None]:
        """Within the block nodes are written for all sites: right behind those that they are made of, and not in front
        of the first site, which would be no layer like the others then.
        """
        last = max(node for node in (next(iter(self.low.graph.nodes)), *after) if isinstance(node, fx.Node))
        while last.next.op == "placeholder":
            last = last.next
        self.for_all = True
        try:
            with self.low.graph.inserting_before(last.next):
                yield
        finally:
            self.for_all = False

    def copy(self, node: fx.Node) -> fx.Node:
        """The node of the new graph that stands for one of the captured graph."""
        return self.low.copy[node]

    def ahead(self, node: fx.Node) -> fx.Node:
        """The same for what does not come of the site's core, but may stand behind it: a weight that is made of a
        parameter where it is used. It is made here once more.
        """
        if node.op in ("placeholder", "get_attr") or node < self.site.core.node:
            return self.copy(node)
        made = self.low.graph.create_node(node.op, node.target, *fx.map_arg((node.args, node.kwargs), self.ahead))
        return self._described(made, example(node))

    def op(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Call `torch.ops.kvpass.<name>`."""
        return self.call(getattr(torch.ops.kvpass, name).default, *args, **kwargs)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function."""
        return self._described(self.low.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any) -> fx.Node:
        """Call a method of the first argument."""
        return self._described(self.low.graph.call_method(name, args))

    def parts(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The first `count` results of a node."""
        return [self.call(operator.getitem, node, at) for at in range(count)]

    def constant(self, values: Any, dtype: torch.dtype) -> fx.Node:
        """A tensor of literals, on the device of the queries."""
        return self.call(torch.tensor, values, dtype=dtype, device=example(self.site.core.q).device)

    def _described(self, node: fx.Node, value: Any = None) -> fx.Node:
        """Give a new node its source, its site and its fake value, if that is not known."""
        names = ("stack_trace",) if self.for_all else ("stack_trace", "nn_module_stack")
        node.meta.update({key: self.core.meta[key] for key in names if key in self.core.meta})
        own = {"site": self.site.name, "layer": self.site.layer}
        node.meta["kvpass"] = {"state": "all"} if self.for_all else own
        node.meta["example_value"] = self._value(node) if value is None else value
        return node

    def _value(self, node: fx.Node) -> Any:
        """Fake value of a new node. Layers are alike, so each value is computed once per graph."""
        given = fx.map_arg((node.args, node.kwargs), lambda n: _looks(example(n)))
        key = (node.target, repr(given))
        if key not in self.low.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), example)
            with example(self.site.core.q).fake_mode:
                self.low.values[key] = called(node, args, kwargs)
        return self.low.values[key]


def _looks(value: Any) -> str:
    """All that a fake result may depend on."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
