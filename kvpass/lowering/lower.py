"""Plan x graph -> rewritten graph: state as inputs, kvpass ops for the attention, cache outputs taken out.

The captured graph is copied first: Dynamo still needs its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.graph.angles import angle_nodes
from kvpass.graph.calls import example
from kvpass.graph.dataflow import flat_outputs
from kvpass.graph.extract import function_of, functions_of
from kvpass.graph.shapes import shape_of
from kvpass.graph.symbols import SizeReader, free_size
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.state import State
from kvpass.lowering.emit import Emitter
from kvpass.lowering.retire import Retirement
from kvpass.plan.plan import Plan
from kvpass.plan.site_plan import SitePlan
from kvpass.runtime.angles import Angles, Positions
from kvpass.runtime.binding import Binding
from kvpass.runtime.step import SharedInput
from kvpass.sites.site import Half, Site
from kvpass.terms import CacheForm, Phase


@dataclass(frozen=True)
class Lowered:
    """A rewritten graph and how to feed it.

    Attributes:
        gm: takes the original inputs, then the state of each site, then the plan's `inputs`; returns the original
            outputs that are no cache.
        bindings: one for each planned site, in order.
        outputs: number of outputs of the original graph.
        states: inputs of `gm` that hold the state of each site, in order.
        sizes_moved: nodes of the original that read sizes of what is gone; they are read elsewhere.
        masks_gone: nodes of the original that only masks were made of which are proved.
    """

    gm: fx.GraphModule
    bindings: tuple[Binding, ...]
    outputs: int
    states: tuple[tuple[fx.Node, ...], ...] = ()
    sizes_moved: frozenset[fx.Node] = frozenset()
    masks_gone: frozenset[fx.Node] = frozenset()


def lower(gm: fx.GraphModule, plan: Plan) -> Lowered:
    """Rewrite the planned sites of a captured graph; all other nodes stay as they are."""
    work = _Lowering(gm, plan)
    bindings = tuple(work.site(site_plan) for site_plan in plan.sites)
    masks_gone = work.retirement.retire_masks(_masks(plan))
    gm, states = work.finish(), tuple(tuple(nodes) for nodes in work.state_inputs)
    return Lowered(gm, bindings, len(work.outputs), states, work.retirement.sizes_moved(), masks_gone)


def _masks(plan: Plan) -> list[fx.Node]:
    """All parts of masks, the newest first."""
    cores = [core for planned in plan.sites for core in planned.site.cores]
    return sorted({term.node for core in cores for term in core.terms}, reverse=True)


class _Lowering:
    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.original = gm
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, fx.Node] = {}
        self.outputs = flat_outputs(next(iter(reversed(gm.graph.nodes))))
        self.graph.graph_copy(gm.graph, self.copy)
        self._return(plan)  # before anything is taken out: what is returned is used
        self.inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.last_input = self.copy[self.inputs[-1]]
        self.sizes = SizeReader(self.inputs)
        self.retirement = Retirement(self.graph, self.copy, self.inputs, self.sizes)
        self.states: dict[Any, State] = {}
        self.state_inputs: list[list[fx.Node]] = []
        self.values: dict[Any, Any] = {}
        self.masks: dict[Any, fx.Node] = {}
        self.spans: dict[Any, fx.Node] = {}
        self.tokens: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.angles: dict[Any, Angles] = {}
        # each goes in front of those before it: state comes between them and the original inputs
        last_first = reversed(plan.inputs)
        self.shared = {one: self._shared_input(one, plan.sites[0].site) for one in last_first}

    def input_of(self, size: Any) -> tuple[fx.Node, int | None] | None:
        """See `Rewriting`."""
        place = self.sizes.known.get(size.node.expr)
        return None if place is None else (self.copy[self.inputs[place[0]]], place[1])

    def site(self, planned: SitePlan) -> Binding:
        """Replace one site by its ops."""
        site = planned.site
        state = self._state_inputs(planned)
        core = self.copy[site.core.node]
        with self.graph.inserting_before(core):
            emit = Emitter(self, planned, core, state)
            outs = emit.decode() if site.phase is Phase.DECODE else emit.multi()
        cores = [self.copy[node] for one in site.cores for node in (*one.inner, one.node)]
        for one, out in zip(site.cores, outs, strict=True):
            self.copy[one.node].replace_all_uses_with(out)
            self.copy[one.node] = out
        self.retirement.retire(cores, site.key, site.value)
        return self._binding(planned)

    def _return(self, plan: Plan) -> None:
        """Return what is no cache."""
        cached = {at for planned in plan.sites for half in (planned.site.key, planned.site.value) for at in half.places}
        kept: list[Any] = [v for at, v in enumerate(self.outputs) if at not in cached]
        self.graph.output(tuple(self.copy[v] if isinstance(v, fx.Node) else v for v in kept))

    def finish(self) -> fx.GraphModule:
        """Compile to a module that shares the original's attributes."""
        self.graph.lint()
        with _use_lazy_graph_module(True):  # as Dynamo does: Inductor never needs the Python code
            result = _make_graph_module(self.original, self.graph, class_name="KVPassGraph")
        result.meta.update(self.original.meta)
        return result

    def _shared_input(self, shared: SharedInput, site: Site) -> fx.Node:
        """An input that all sites share, of which `site` is the first."""
        fake, name = example(site.core.q), f"kvpass_{shared.name}"
        with self.graph.inserting_after(self.last_input):
            node = self.graph.placeholder(name)
        if shared.axes is None:
            value = free_size(fake.fake_mode.shape_env, name)
        else:
            sizes = [int(letter) if letter.isdigit() else site.dims[letter] for letter in shared.axes]
            with fake.fake_mode:
                value = torch.empty(sizes, dtype=shared.dtype, device=fake.device)
        node.meta = {"example_value": value, "kvpass": {"state": shared.name}}
        return node

    def _state_inputs(self, planned: SitePlan) -> dict[str, fx.Node]:
        """The state of a site by name, in the order of its fields."""
        nodes: dict[str, fx.Node] = {}
        held = self._state_example(planned)
        for field, value in zip(held.fields, held.tensors(), strict=True):
            with self.graph.inserting_after(self.last_input):
                node = self.graph.placeholder(f"kvpass_{planned.site.layer}_{field.name}")
            about = {"site": planned.site.name, "layer": planned.site.layer, "state": field.name}
            node.meta = {"example_value": value, "kvpass": about}
            self.last_input = node
            nodes[field.name] = node
        self.state_inputs.append(list(nodes.values()))
        return nodes

    def _state_example(self, planned: SitePlan) -> State:
        """Fake state of a site under the tracer's fake mode; one set for all sites of equal shape and rule, which grow
        together unless data decides.
        """
        site, fake_q = planned.site, example(planned.site.core.q)
        key = (planned.rule, str(site.dims), site.dtype, site.name if planned.rule[ShareOut].share else "")
        if key not in self.states:
            sizes = {"B": "B", "H": "Hkv", "D": "D", "V": "Dv"}
            with fake_q.fake_mode:
                c = free_size(fake_q.fake_mode.shape_env, "kvpass_capacity")
                held: dict[str, Any] = {letter: site.dims[own] for letter, own in sizes.items()}
                if planned.rule.demotes:
                    held["W"] = free_size(fake_q.fake_mode.shape_env, "kvpass_whole")
                self.states[key] = State.empty(planned.rule, fake_q, C=c, **held)
        return self.states[key]

    def _binding(self, planned: SitePlan) -> Binding:
        site = planned.site
        fake = example(site.core.q)
        dims, update = dict(site.dims), site.key.update
        if update.axis is not None and update.form is CacheForm.BUFFER:
            dims["L"] = shape_of(update.node)[update.axis]
        return Binding(
            name=site.name,
            layer=site.layer,
            phase=site.phase,
            rule=planned.rule,
            layouts=(site.key.layout, site.value.layout),
            past=None if site.key.update.past is None else (self._place(site.key), self._place(site.value)),
            returned=(site.key.places, site.value.places),
            sizes={letter: self.sizes.read(size) for letter, size in dims.items()},
            dtype=site.dtype,
            device=fake.device,
            where=f"{site.name}, {site.source}",
            start=self._start(update.start) if "L" in dims else None,
            paths=(update.path, site.value.update.path),
            ends=tuple(
                (self.sizes.read(h.end.size), h.end.masked) for h in (site.key, site.value) if h.end is not None
            ),
            renews=update.renews,
            joined=update.node is site.value.update.node,
            host=self._host(site),
            angles=self._angles(planned),
        )

    def _host(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Heads and entries of the host's keys and values, where the slots hold them otherwise."""
        if site.core.latent is None and site.mixed is None:
            return None
        return _heads_and_entries(site.key), _heads_and_entries(site.value)

    def _angles(self, planned: SitePlan) -> Angles | None:
        """Cosines and sines of a call as functions of the graph's inputs, and of other positions."""
        found = planned.key_rotation
        if found is None or planned.key_positions is None:
            return None
        key = found.cos, found.sin
        if key not in self.angles:  # layers share them
            gm, nodes, (candidates, table) = self.original, angle_nodes(found), planned.key_positions
            if planned.site.phase is Phase.DECODE and planned.site.key.update.form is not CacheForm.BUFFER:
                candidates = []  # a first call has shown the step; into a buffer, this may be it
            positions = [Positions(function_of(gm, n), functions_of(gm, nodes, n), table) for n in candidates]
            self.angles[key] = Angles(functions_of(gm, nodes), found.halved, tuple(positions))
        return self.angles[key]

    def _start(self, start: Any) -> Callable[[Sequence[Any]], Any]:
        """Where a buffer is written, as a function of the graph's inputs."""
        value = example(start) if isinstance(start, fx.Node) else start
        return function_of(self.original, start) if isinstance(value, torch.Tensor) else self.sizes.read(value)

    def _place(self, half: Half) -> int:
        assert half.update.past is not None
        return self.inputs.index(half.update.past)


def _heads_and_entries(half: Half) -> tuple[int, int]:
    sizes = shape_of(half.update.new)
    return half.layout.heads(sizes), half.layout.entries(sizes)
