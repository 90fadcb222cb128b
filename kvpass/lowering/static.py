"""A decode graph in which nothing changes from step to step but what tensors hold, so that a device can record it.

What changes in a lowered decode graph are sizes: the past's length P, and P + 1 of whatever is as long as all tokens.
A number that is made of them is used in one of two ways:

    as a value   `arange(1) + P`, `x[P]`, the `position` of an op: read from a tensor on the device instead, `kvpass_at`
    as a size    `arange(P + 1)`, `expand(.., P + 1)`: stays, and the graph runs as if the past were longer; inputs of
                 that size get columns of zeros. Nobody looks at columns behind the token, if all that is done with such
                 tensors is done column by column.

Whatever else is done with P makes the graph one that is not static, for a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.graph.calls import call_name, changes, example, source_line
from kvpass.graph.dataflow import flat_outputs
from kvpass.graph.symbols import SizeReader
from kvpass.lowering.lower import Lowered
from kvpass.lowering.static_calls import StaticCalls
from kvpass.lowering.static_sizes import NotStatic, steps_of
from kvpass.lowering.written import memory_of, written_by
from kvpass.plan.plan import Plan
from kvpass.runtime.feeds import Feed, Feeds
from kvpass.terms import Phase


@dataclass(frozen=True)
class Static:
    """A decode graph that a device can record.

    Attributes:
        gm: takes what `feeds` say; returns what the lowered graph returns.
    """

    gm: fx.GraphModule
    feeds: Feeds


def static(lowered: Lowered, plan: Plan) -> Static | str:
    """The static form of a lowered graph, which stays as it is; or why there is none, in words."""
    try:
        return _Rewriting(lowered, plan).static()
    except NotStatic as reason:
        return str(reason)


class _Rewriting:
    def __init__(self, lowered: Lowered, plan: Plan) -> None:
        if any(one.site.phase is not Phase.DECODE for one in plan.sites):
            raise NotStatic("not all of its attentions are those of one token")
        self.lowered = lowered
        copy: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()
        result = self.graph.graph_copy(lowered.gm.graph, copy)
        self.graph.output(result)
        self.inputs = [copy[n] for n in lowered.gm.graph.nodes if n.op == "placeholder"]
        self.steps = steps_of(self.inputs, [copy[n] for some in lowered.states for n in some], self.graph, plan)
        self.at = self._at()

    def static(self) -> Static:
        """The graph with its inputs."""
        self._constants()
        drop_dead(self.graph)
        calls = StaticCalls(self.graph, self.steps, self.at)
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "call_method", "call_module") and isinstance(example(node), torch.Tensor):
                calls.rewrite(node)
            elif node.op not in ("placeholder", "output") and not self.steps.is_number(node):
                calls.refuse_if_read(node)
        drop_dead(self.graph)
        self._check_outputs()
        feeds = self._feeds()
        self.graph.lint()
        with _use_lazy_graph_module(True):
            gm = _make_graph_module(self.lowered.gm, self.graph, class_name="KVPassStaticGraph")
        gm.meta.update(self.lowered.gm.meta)
        return Static(gm, feeds)

    def _at(self) -> fx.Node:
        """The position of the token on the device, int32 [1]: the last input."""
        q = next(n for n in self.graph.nodes if call_name(n) == "decode_attend").args[0]
        assert isinstance(q, fx.Node)
        with self.graph.inserting_after(self.inputs[-1]):
            node = self.graph.placeholder("kvpass_at")
        with example(q).fake_mode:
            node.meta = {"example_value": torch.empty(1, dtype=torch.int32, device=example(q).device)}
        node.meta["kvpass"] = {"state": "at"}
        return node

    def _constants(self) -> None:
        """Sizes that a graph reads of an input, and that are numbers or inputs of their own: shells need not stay."""
        inputs = {example(n).node.expr: n for n in reversed(self.inputs) if isinstance(example(n), torch.SymInt)}
        for node in list(self.graph.nodes):
            value = example(node)
            if node.op not in ("call_function", "call_method"):
                continue
            if type(value) is int:
                node.replace_all_uses_with(value)
            elif isinstance(value, torch.SymInt) and value.node.expr in inputs:
                node.replace_all_uses_with(inputs[value.node.expr])

    def _check_outputs(self) -> None:
        for value in flat_outputs(next(iter(reversed(self.graph.nodes)))):
            if isinstance(value, fx.Node) and (self.steps.grows(value) or self.steps.is_step(value)):
                raise NotStatic(f"it returns {value.name}, which is as long as all tokens")

    def _feeds(self) -> Feeds:
        """How each remaining input is filled; the others go."""
        feeds: list[Feed] = []
        for place, node in enumerate(self.inputs):
            if node.users:
                feeds.append(self._feed(place, node))
            else:
                self.graph.erase_node(node)
        originals = [n for n in self.lowered.gm.graph.nodes if n.op == "placeholder"]
        states = [originals.index(n) for some in self.lowered.states for n in some]
        reader = SizeReader(originals)
        others = [
            n for n in originals[: states[0]] if isinstance(example(n), torch.SymInt) and not self.steps.is_step(n)
        ]
        return Feeds(
            tuple(feeds),
            checks=tuple((reader.read(size), more) for size, more in self.steps.guessed),
            sizes=tuple(originals.index(n) for n in others),
            changed=frozenset(self._changed()),
            states=min(states),
            shared=max(states) + 1,
        )

    def _changed(self) -> Iterator[int]:
        """Places of inputs, other than state, whose memory a call changes in place."""
        written = {memory_of(value) for node in self.graph.nodes for value in written_by(node)} - {None}
        for place, node in enumerate(self.inputs):
            if memory_of(node) in written and "kvpass" not in node.meta:
                yield place

    def _feed(self, place: int, node: fx.Node) -> Feed:
        value = example(node)
        if self.steps.is_step(node):
            return Feed(place, length=self.steps.offset(value))
        if not isinstance(value, torch.Tensor):
            return Feed(place)
        wide = tuple(axis for axis, size in enumerate(value.shape) if self.steps.is_end(size))
        if self.steps.grows(node) and len(wide) != sum(map(self.steps.is_made_of_steps, value.shape)):
            reader = next(iter(node.users))
            raise NotStatic(f"{call_name(reader)} reads a cache that grows, {node.name} ({source_line(reader)})")
        if wide:  # columns of zeros are put behind a copy
            with example(self.at).fake_mode:
                node.meta["example_value"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return Feed(place, wide=wide)


def drop_dead(graph: fx.Graph) -> None:
    """Erase calls whose results nobody reads, and that do nothing else."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and _is_pure(node):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    value = example(node)
    if not isinstance(value, (torch.Tensor, torch.SymInt, torch.SymBool, int)) or changes(node):
        return False
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return not mutable and node.kwargs.get("out") is None
