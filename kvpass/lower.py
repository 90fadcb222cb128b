"""Plan x graph -> rewritten graph: state as inputs, kvpass ops for the attention, cache outputs taken out.

The captured graph is copied first: Dynamo still needs its own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

import kvpass.ops  # noqa: F401  (registers torch.ops.kvpass)
from kvpass.match.calls import example, is_metadata
from kvpass.match.dataflow import flat_outputs
from kvpass.match.shapes import shape_of
from kvpass.match.symbols import SizeReader, free_size
from kvpass.plan import Plan, SitePlan
from kvpass.runtime.bind import Binding
from kvpass.site import Half
from kvpass.terms import Layout, Phase

STATE = ("k", "v", "pos", "stats", "cursor")


@dataclass(frozen=True)
class Lowered:
    """A rewritten graph and how to feed it.

    Attributes:
        gm: takes the original inputs, then `STATE` for each site; returns the original outputs that are no cache.
        bindings: one for each planned site, in order.
        outputs: number of outputs of the original graph.
    """

    gm: fx.GraphModule
    bindings: tuple[Binding, ...]
    outputs: int


def lower(gm: fx.GraphModule, plan: Plan) -> Lowered:
    """Rewrite the planned sites of a captured graph; all other nodes stay as they are."""
    work = _Lowering(gm)
    bindings = tuple(work.site(site_plan) for site_plan in plan.sites)
    return Lowered(work.finish(bindings), bindings, len(work.outputs))


class _Lowering:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.original = gm
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, fx.Node] = {}
        self.outputs = flat_outputs(next(iter(reversed(gm.graph.nodes))))
        self.graph.graph_copy(gm.graph, self.copy)
        self.inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.last_input = self.copy[self.inputs[-1]]
        self.sizes = SizeReader(self.inputs)
        self.states: dict[Any, list[Any]] = {}
        self.values: dict[Any, Any] = {}

    def site(self, planned: SitePlan) -> Binding:
        """Replace one site by its ops."""
        site = planned.site
        state = self._state_inputs(planned)
        core = self.copy[site.core.node]
        with self.graph.inserting_before(core):
            emit = _Emitter(self, planned, core, state)
            out = emit.decode() if site.phase is Phase.DECODE else emit.multi()
        core.replace_all_uses_with(out)
        self.copy[site.core.node] = out
        self._retire(core, site.key, site.value)
        return self._binding(planned)

    def _state_inputs(self, planned: SitePlan) -> list[fx.Node]:
        nodes = []
        for name, value in zip(STATE, self._state_examples(planned), strict=True):
            with self.graph.inserting_after(self.last_input):
                node = self.graph.placeholder(f"kvpass_{planned.site.layer}_{name}")
            marks = {"site": planned.site.name, "layer": planned.site.layer, "state": name}
            node.meta = {"example_value": value, "kvpass": marks}
            self.last_input = node
            nodes.append(node)
        return nodes

    def _state_examples(self, planned: SitePlan) -> list[Any]:
        """Fake state of a site under the tracer's fake mode; one set for all sites of equal shape and rule, which grow
        together.
        """
        site, fake_q = planned.site, example(planned.site.core.q)
        key = (planned.rule, str(site.dims), site.dtype)
        if key not in self.states:
            b, hkv, d, dv = (site.dims[letter] for letter in ("B", "Hkv", "D", "Dv"))
            with fake_q.fake_mode:
                c = free_size(fake_q.fake_mode.shape_env, "kvpass_capacity")
                int32: Any = {"dtype": torch.int32, "device": fake_q.device}
                self.states[key] = [
                    fake_q.new_empty((b, hkv, c, d)),
                    fake_q.new_empty((b, hkv, c, dv)),
                    torch.empty((b, hkv, c), **int32),
                    torch.empty((len(planned.rule.stats), b, hkv, c), dtype=torch.float32, device=fake_q.device),
                    torch.empty((b, hkv, 4), **int32),
                ]
        return self.states[key]

    def _retire(self, core: fx.Node, *halves: Half) -> None:
        """Erase the core, the views that fed it and the cache updates; metadata reads of a cache go to a shell of its
        shape.
        """
        self.graph.erase_node(core)
        for half in halves:
            for view in reversed(half.chain):
                if not self.copy[view].users:
                    self.graph.erase_node(self.copy[view])
            node = self.copy[half.update.node]
            if half.update.node is half.update.new:
                continue
            if node.users:
                self._stand_in(node, half)
            self.graph.erase_node(node)

    def _stand_in(self, node: fx.Node, half: Half) -> None:
        assert all(is_metadata(user) for user in node.users)
        new = self.copy[half.update.new]
        with self.graph.inserting_before(node):
            sizes = [self.graph.call_method("size", (new, axis)) for axis in range(4)]
            if half.update.past is not None:
                past = self.graph.call_method("size", (self.copy[half.update.past], half.layout.token_axis))
                sizes[half.layout.token_axis] = self.graph.call_function(
                    operator.add, (past, sizes[half.layout.token_axis])
                )
            one = self.graph.call_method("new_empty", (new, (1,)))
            shell = self.graph.call_method("expand", (one, *sizes))
        for created in (*sizes, one, shell):
            created.meta = {"example_value": None, "kvpass": {"shell of": node.name}}
        shell.meta["example_value"] = example(node)
        node.replace_all_uses_with(shell)

    def _binding(self, planned: SitePlan) -> Binding:
        site = planned.site
        fake = example(site.core.q)
        return Binding(
            name=site.name,
            layer=site.layer,
            phase=site.phase,
            rule=planned.rule,
            layouts=(site.key.layout, site.value.layout),
            past=None if site.phase is Phase.PREFILL else (self._place(site.key), self._place(site.value)),
            returned=(site.key.places, site.value.places),
            sizes={letter: self.sizes.read(site.dims[letter]) for letter in ("B", "Hkv", "D", "Dv", "S")},
            dtype=site.dtype,
            device=fake.device,
            where=f"{site.name}, {site.source}",
        )

    def _place(self, half: Half) -> int:
        assert half.update.past is not None
        return self.inputs.index(half.update.past)

    def finish(self, bindings: Sequence[Binding]) -> fx.GraphModule:
        """Return what is no cache; compile to a module that shares the original's attributes."""
        cached = {at for b in bindings for half in b.returned for at in half}
        kept: list[Any] = [v for at, v in enumerate(self.outputs) if at not in cached]
        self.graph.output(tuple(self.copy[v] if isinstance(v, fx.Node) else v for v in kept))
        self.graph.lint()
        with _use_lazy_graph_module(True):  # as Dynamo does: Inductor never needs the Python code
            result = _make_graph_module(self.original, self.graph, class_name="KVPassGraph")
        result.meta.update(self.original.meta)
        return result


class _Emitter:
    """Writes the ops of one site in front of its core."""

    def __init__(self, lowering: _Lowering, planned: SitePlan, core: fx.Node, state: list[fx.Node]) -> None:
        self.low, self.graph, self.planned, self.core = lowering, lowering.graph, planned, core
        self.k, self.v, self.pos, self.stats, self.cursor = state
        self.rule = planned.rule.encode()
        self.number = count()
        site = planned.site
        self.q = lowering.copy[site.core.q]
        self.new_k, self.new_v = self._heads_first(site.key), self._heads_first(site.value)
        self.mask = self._mask4()
        self.position = self._position()

    def decode(self) -> fx.Node:
        args = (self.q, self.new_k, self.new_v, self.mask, self.k, self.v, self.pos, self.stats, self.cursor)
        return self._op("decode_attend", *args, self.position, self.planned.site.core.scale, self.rule)

    def multi(self) -> fx.Node:
        """Prefill or extend."""
        k: Any = self.new_k
        v: Any = self.new_v
        pos = past_stats = None
        if self.planned.site.phase is Phase.EXTEND:
            joined = self._op("join_slots", self.k, self.v, self.pos, self.stats, self.cursor, k, v, self.position)
            k, v, pos, past_stats = self._parts(joined, 4)
        core = self.planned.site.core
        out, stats, valid = self._parts(
            self._op("prefill_attend", self.q, k, v, pos, self.mask, core.scale, core.causal, self.rule), 3
        )
        scored = self._op("score_slots", stats, past_stats, pos, valid, self.cursor, self.position, self.rule)
        score, stats, cursor = self._parts(scored, 3)
        capacity = self._call_method("size", self.k, 2)
        chosen = self._op("select_slots", score, cursor, capacity)
        self._op("compact_slots", k, v, pos, stats, chosen, cursor, self.k, self.v, self.pos, self.stats, self.cursor)
        return out

    def _heads_first(self, half: Half) -> fx.Node:
        node = self.low.copy[half.update.new]
        return node if half.layout is Layout.BHTD else self._call_method("transpose", node, 1, 2)

    def _mask4(self) -> fx.Node | None:
        mask = self.planned.site.core.mask
        if mask is None:
            return None
        node, missing = self.low.copy[mask], 4 - len(shape_of(mask))
        return self._call(operator.getitem, node, (None,) * missing + (Ellipsis,)) if missing else node

    def _position(self) -> fx.Node | int:
        half = self.planned.site.key
        if half.update.past is None:
            return 0
        return self._call_method("size", self.low.copy[half.update.past], half.layout.token_axis)

    def _op(self, name: str, *args: Any) -> fx.Node:
        return self._call(getattr(torch.ops.kvpass, name).default, *args)

    def _parts(self, node: fx.Node, count: int) -> list[fx.Node]:
        return [self._call(operator.getitem, node, at) for at in range(count)]

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self._described(self.graph.call_function(target, args))

    def _call_method(self, name: str, *args: Any) -> fx.Node:
        return self._described(self.graph.call_method(name, args))

    def _described(self, node: fx.Node) -> fx.Node:
        """Give a new node its source, its site and its fake value."""
        node.meta.update(
            {key: self.core.meta[key] for key in ("stack_trace", "nn_module_stack") if key in self.core.meta}
        )
        node.meta["kvpass"] = {"site": self.planned.site.name, "layer": self.planned.site.layer}
        node.meta["example_value"] = self._value(node)
        return node

    def _value(self, node: fx.Node) -> Any:
        """Fake value of a new node. Sites of equal shapes emit equal sequences, so each value is computed once per
        graph.
        """
        site = self.planned.site
        mask = shape_of(site.core.mask) if site.core.mask is not None else None
        kind = site.dtype, str(site.dims), str(mask)
        key = (self.rule, site.phase, *kind, site.key.layout, site.value.layout, next(self.number))
        if key not in self.low.values:
            args = fx.map_arg(node.args, lambda n: example(n))
            with example(self.q).fake_mode:
                call = getattr(args[0], node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
                self.low.values[key] = call(*(args[1:] if node.op == "call_method" else args))  # type: ignore[operator]
        return self.low.values[key]
