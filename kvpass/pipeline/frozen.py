"""Weights as constants of compiled code, for Inductor's `freezing`: which, and whether the model still has them.

Dynamo hands parameters to a backend as inputs, and Inductor freezes attributes of a module alone. So the parameters
among a graph's inputs become attributes of what is compiled; the callable still takes them, to see that they are the
ones that were frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.errors import ModelError
from kvpass.runtime.identity import digests


def weights_in(gm: fx.GraphModule, given: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The parameters among a graph's inputs, by placeholder, whose data can be read and packed.

    Args:
        given: real inputs, for the graph's first placeholders, in order.

    Raises:
        ModelError: gradients are on, under which Inductor freezes nothing.
    """
    if torch.is_grad_enabled():
        what = "weights cannot be frozen where gradients may be asked for"
        hint = "call the model under torch.no_grad() or torch.inference_mode(), or compile without freezing"
        raise ModelError(what, where="inner={'freezing': True}", hint=hint)
    inputs = gm.graph.find_nodes(op="placeholder")
    pairs = zip(inputs, given, strict=False)
    return {node: one for node, one in pairs if type(one) is torch.nn.Parameter and one.layout is torch.strided}


def with_constants(gm: fx.GraphModule, values: Mapping[int, torch.Tensor]) -> fx.GraphModule:
    """A copy of a graph in which the placeholders at these places are attributes."""
    graph, copy, places = fx.Graph(), dict[fx.Node, Any](), 0
    attributes: dict[str, Any] = {}
    for node in gm.graph.nodes:
        at, places = places, places + (node.op == "placeholder")
        if node.op == "placeholder" and at in values:
            name = f"frozen_weight_{at}"
            attributes[name] = values[at]
            copy[node] = graph.create_node("get_attr", name)
            copy[node].meta = dict(node.meta)
            continue
        if node.op in ("get_attr", "call_module"):
            attributes[str(node.target)] = _attribute(gm, str(node.target))
        copy[node] = graph.node_copy(node, copy.__getitem__)
    with _use_lazy_graph_module(True):
        return _make_graph_module(attributes, graph, class_name="KVPassFrozen")


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value


def without(call: Callable[..., Any], places: Collection[int], count: int) -> Callable[..., Any]:
    """`call`, which takes the inputs at other places than these, as a function of all `count` inputs."""
    others = [at for at in range(count) if at not in places]
    return lambda *args: call(*[args[at] for at in others])


class Checked:
    """Compiled code that has weights of its own, called with the model's.

    Args:
        call: takes all inputs.
        weights: those that were frozen, by their places among the inputs.
        begins: the graph reads prompts: look at some entries of each weight too, once a call. (A change through `.data`
            shows in no other way.)
    """

    def __init__(self, call: Callable[..., Any], weights: Mapping[int, torch.Tensor], begins: bool) -> None:
        self.call, self.weights, self.places = call, [*weights.values()], [*weights]
        self.counted = [tensor for tensor in self.weights if not tensor.is_inference()]  # torch counts writes to them
        self.ids, self.state = [*map(id, self.weights)], self._state()
        self.digests = digests(self.weights) if begins else None

    def __call__(self, *args: Any) -> Any:
        """
        Raises:
            ModelError: a weight is another one, or was changed.
        """
        if [id(args[at]) for at in self.places] != self.ids or self._state() != self.state:
            raise _changed()
        if self.digests is not None and digests(self.weights) != self.digests:
            raise _changed()
        return self.call(*args)

    def _state(self) -> list[int]:
        """Where each weight lies, and how often it was written to; without a line of Python for each."""
        return [*map(torch.Tensor.data_ptr, self.weights), *map(_written, self.counted)]


_written = attrgetter("_version")


def _changed() -> ModelError:
    return ModelError(
        "a weight was changed or replaced after it was frozen into the compiled code",
        where="inner={'freezing': True}",
        hint="call kvpass.compile(model, ..) again after the update, or compile without freezing, which follows it",
    )
