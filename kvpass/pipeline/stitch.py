"""A graph as a sequence of compiled regions: one code for all regions of a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.graph.calls import example
from kvpass.graph.dataflow import flat_outputs
from kvpass.pipeline.frozen import with_constants
from kvpass.pipeline.region_form import Form, is_constant
from kvpass.pipeline.regions import Region

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Stitched:
    """Runs the regions of a graph one after the other. Takes the graph's inputs, returns its outputs as a list.

    Args:
        weights: inputs that are constants of the code: each region that reads some has code of its own. (Its
            kernels are compiled once all the same: Inductor keeps them by their source.)
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        regions: Sequence[Region],
        compile: Compile,
        weights: Mapping[fx.Node, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        nodes = list(gm.graph.nodes)
        self._slots: dict[fx.Node, int] = {}
        for node in nodes:
            if node.op == "placeholder":
                self._slots[node] = len(self._slots)
        self._inputs = len(self._slots)
        calls = _compiled(gm, regions, compile, weights)
        outputs = flat_outputs(nodes[-1])
        given = [[node for node in r.form.inputs if node not in weights] for r, _ in calls]
        steps = [
            (call, self._places(inputs), self._places(r.form.outputs))
            for inputs, (r, call) in zip(given, calls, strict=True)
        ]
        self._outputs = [self._result(value) for value in outputs]
        self._steps = self._with_ends(steps)
        self._others = len(self._slots) - self._inputs

    def __call__(self, *args: Any) -> list[Any]:
        values = [*args, *[None] * self._others]
        for call, inputs, outputs, ended in self._steps:
            results = call(*[values[at] for at in inputs])
            for at, value in zip(outputs, results, strict=True):
                values[at] = value
            for at in ended:
                values[at] = None
        return [values[at] if at is not None else value for at, value in self._outputs]

    def _places(self, nodes: Sequence[fx.Node]) -> list[int]:
        return [self._slots.setdefault(node, len(self._slots)) for node in nodes]

    def _result(self, value: Any) -> tuple[int | None, Any]:
        """(place, None) or (None, constant) of an output."""
        if not isinstance(value, fx.Node):
            return None, value
        return (None, example(value)) if is_constant(value) else (self._slots[value], None)

    def _with_ends(self, steps: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[Any, ...]]:
        """Add to each step the places of values that nobody reads after it."""
        seen = {at for at, _ in self._outputs if at is not None} | set(range(self._inputs))
        result: list[tuple[Any, ...]] = []
        for call, inputs, outputs in reversed(steps):
            ended = [at for at in {*inputs, *outputs} if at not in seen]
            seen.update(ended)
            result.append((call, inputs, outputs, ended))
        return result[::-1]


def _compiled(
    gm: fx.GraphModule, regions: Sequence[Region], compile: Compile, weights: Mapping[fx.Node, torch.Tensor]
) -> list[tuple[Region, Callable[..., Any]]]:
    """Each region with its code: that of the first one of its kind, if all that was taken for granted of sizes when
    that was compiled holds for this one too.
    """
    calls: list[tuple[Region, Callable[..., Any]]] = []
    for region in regions:
        own = {at: weights[node] for at, node in enumerate(region.form.inputs) if node in weights}
        like = (call for other, call in calls if other.kind == region.kind and _may_stand_in(other.form, region.form))
        call = next(like, None) if not own else None
        if call is None:
            part = _function(gm, region.form)
            part = with_constants(part, own) if own else part
            call = compile(part, _examples(part))
        calls.append((region, call))
    return calls


def _function(gm: fx.GraphModule, form: Form) -> fx.GraphModule:
    """A region as a graph module of its own; its nodes are copies."""
    graph = fx.Graph()
    copy: dict[fx.Node, Any] = {}
    for node in form.inputs:
        copy[node] = graph.placeholder(node.name)
        copy[node].meta = {"example_value": example(node)}
    for node in form.nodes:
        copy[node] = graph.node_copy(node, lambda value: copy[value] if value in copy else example(value))
    graph.output(tuple(copy[node] for node in form.outputs))
    with _use_lazy_graph_module(True):
        return _make_graph_module(gm, graph, class_name="KVPassRegion")


def _examples(gm: fx.GraphModule) -> list[Any]:
    return [example(node) for node in gm.graph.nodes if node.op == "placeholder"]


def _may_stand_in(compiled: Form, other: Form) -> bool:
    """Does each guard on sizes of the compiled region hold for the other's sizes? It becomes a guard for them too."""
    renamed = {a: b for a, b in zip(compiled.symbols, other.symbols, strict=True) if a is not b}
    env = _shape_env(compiled)
    if not renamed or env is None:
        return True
    guards = {guard.expr for guard in env.guards if guard.expr.free_symbols & renamed.keys()}
    return all(bool(env.evaluate_expr(expr.xreplace(renamed))) for expr in guards)


def _shape_env(form: Form) -> Any:
    values = (example(node) for node in form.inputs)
    return next((v.fake_mode.shape_env for v in values if isinstance(v, torch.Tensor)), None)  # type: ignore[attr-defined]  # they are fake
