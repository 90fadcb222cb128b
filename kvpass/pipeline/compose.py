"""Composition root: scan -> plan -> lower -> verify -> inner compiler -> bind. The only importer of
`patterns.DEFAULT`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from kvpass.errors import KVPassError
from kvpass.graph.calls import example
from kvpass.pipeline.arguments import check_options
from kvpass.pipeline.conditions import MARK, decided_from_now_on
from kvpass.pipeline.graphs import GraphRecord, Graphs, capture_seconds
from kvpass.pipeline.inner import compile_inner
from kvpass.pipeline.inner_options import EAGER, Inner
from kvpass.pipeline.recorded import recorded
from kvpass.pipeline.refusal import Refusal, kept, or_as_it_is, refuse_training, stage, strict_error
from kvpass.policy.policy import Policy
from kvpass.runtime.active import current
from kvpass.runtime.breaks import told
from kvpass.terms import Phase

if TYPE_CHECKING:
    from kvpass.lowering.lower import Lowered
    from kvpass.plan.plan import Plan
    from kvpass.runtime.identity import Origin
    from kvpass.runtime.recordings import Recordings
    from kvpass.runtime.sharded import Sharded
    from kvpass.sites.table import SiteTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A `torch.compile` backend with a policy baked in. Equal options give equal, hash-equal backends, so Dynamo does
    not recompile.

    Attributes:
        policy: checked, with its budget.
        inner: who compiles the rewritten graph, and with which options.
        strict: a declined site is an error; else it stays dense, correct and reported.
        debug: folder for the debug report, or None.
        verify: check each site at full budget against the unmodified subgraph on the first real inputs.
        patterns: recognisers; None for `kvpass.patterns.DEFAULT`.
        mode: `default`, or `reduce-overhead`: steps are CUDA graphs.
        part: of the model that this process has, under tensor parallelism; None: all of it.
        graphs: records of the graphs compiled so far (not part of equality); printed, a table.
        recordings: what a device has recorded of their steps, once it has (likewise).
    """

    policy: Policy
    inner: Inner = field(default_factory=Inner)
    strict: bool = True
    debug: str | None = None
    verify: bool = False
    patterns: Any = None
    mode: str = "default"
    part: Sharded | None = None
    graphs: Graphs = field(default_factory=Graphs, compare=False, repr=False)
    recordings: list[Recordings] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None) -> Callable[..., Any]:
        """Compile one captured graph. Errors of kvpass are raised, unwrapped, when the result is called.

        mode: that of `torch.compile(model, backend=kvpass.backend(..), mode=..)`, instead of the backend's own.
        """
        if mode is not None and mode != self.mode:
            try:
                check_options(mode=mode)
            except KVPassError as error:
                return Refusal(error)
            return replace(self, mode=mode)(gm, example_inputs)
        call = current()
        if call is not None:
            call.compiling()
        else:
            decided_from_now_on()
        try:
            if self.strict:
                return self._compile(gm, example_inputs)
            given = gm, example_inputs
            return or_as_it_is(partial(self._compile, *given), partial(self._as_it_is, *given, len(self.graphs)))
        except KVPassError as error:
            log.info("refused: %s", error)
            return Refusal(error)

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from kvpass.debug import stages
        from kvpass.graph.dataflow import data_inputs
        from kvpass.graph.plain import plain
        from kvpass.patterns import DEFAULT
        from kvpass.pipeline.parted import check_parted
        from kvpass.runtime.untouched import Untouched
        from kvpass.sites.dense import dense_by_choice
        from kvpass.sites.scan import scan

        start = time.perf_counter()
        if not self.strict:
            gm = kept(gm)
        with stage("scan"):
            gm = plain(gm)
            table = scan(gm, self.patterns or DEFAULT)
        record = GraphRecord(table, inner=str(self.inner), seconds={"scan": time.perf_counter() - start})
        self.graphs.append(record)
        log.info("graph %d: %s", len(self.graphs), table)
        call = current()
        if self.strict and table.failed:
            with stages(self.debug, len(self.graphs), gm, record, None):
                raise strict_error(table, told(call.breaks) if call is not None else "")
        if not table.sites:
            written: list[tuple[int, int, str]] = []
            if self.strict and call is not None:
                written = check_parted(gm.graph, example_inputs, self.patterns or DEFAULT, call)
            chosen = self.inner if call is None or call.whole else EAGER  # an encoder or a head, called alone
            with stages(self.debug, len(self.graphs), gm, record, None), record.timed("inner"):
                inner = compile_inner(chosen, gm, example_inputs, real=example_inputs)
            left = self._origin(table) if table.declined else None
            return Untouched(inner, data_inputs(gm.graph), dense_by_choice(gm.graph, table.declined), left, written)
        refuse_training(table)
        return self._rewrite(gm, example_inputs, record)

    def _as_it_is(self, gm: fx.GraphModule, example_inputs: list[Any], before: int) -> Callable[..., Any]:
        """A graph in which a stage of ours failed, as the model wrote it."""
        from kvpass.graph.dataflow import data_inputs
        from kvpass.runtime.untouched import Untouched
        from kvpass.sites.table import SiteTable

        self.graphs[before:] = [GraphRecord(SiteTable(), inner=str(self.inner))]
        inner = compile_inner(self.inner, gm, example_inputs, real=example_inputs)
        return Untouched(inner, data_inputs(gm.graph), (), self._origin(SiteTable()))

    def _rewrite(self, gm: fx.GraphModule, example_inputs: list[Any], record: GraphRecord) -> Callable[..., Any]:
        from kvpass.graph.symbols import hinted
        from kvpass.runtime.forms import Forms

        planned, lowered = self._lowered(gm, record, record.table)
        if self.strict:
            return self._bound(gm, example_inputs, record, planned, lowered, self.inner)
        forms = Forms(
            lowered.bindings,
            partial(self._form, gm, example_inputs, record, (planned, lowered)),
            self._origin(record.table),
        )
        forms.of(hinted(example_inputs))
        return forms

    def _lowered(self, gm: fx.GraphModule, record: GraphRecord, table: SiteTable) -> tuple[Plan, Lowered]:
        from kvpass.lowering.lower import lower
        from kvpass.plan.on_ranks import check_exchanges
        from kvpass.plan.plan import plan

        with record.timed("plan"), stage("plan"):
            planned = plan(self.policy, table, self.part)
            check_exchanges(gm, self.policy, [one.rule for one in planned.sites], self.part)
        with record.timed("lower"), stage("lower"):
            return planned, lower(gm, planned)

    def _form(
        self,
        gm: fx.GraphModule,
        example_inputs: list[Any],
        record: GraphRecord,
        whole: tuple[Plan, Lowered],
        dense: frozenset[int],
        first: bool,
    ) -> Callable[..., Any]:
        """The graph with the sites at some places of a plan left as they are. Only the form for a graph's first call is
        compiled: guards of a later one would reach nobody.
        """
        from kvpass.graph.dataflow import data_inputs
        from kvpass.runtime.untouched import Untouched

        inner = self.inner if first else EAGER
        if not dense:
            return self._bound(gm, example_inputs, record, *whole, inner)
        left = [one.site for at, one in enumerate(whole[0].sites) if at not in dense]
        if not left:
            run = compile_inner(inner, gm, example_inputs, real=example_inputs)
            return Untouched(run, data_inputs(gm.graph), (), self._origin(record.table))
        # layers are counted as in the graph of the prompt, which did not rewrite the others either
        sites = tuple(replace(site, layer=layer) for layer, site in enumerate(left))
        parts = self._lowered(gm, record, replace(record.table, sites=sites))
        return self._bound(gm, example_inputs, record, *parts, inner)

    def _bound(
        self,
        gm: fx.GraphModule,
        example_inputs: list[Any],
        record: GraphRecord,
        planned: Plan,
        lowered: Lowered,
        chosen: Inner,
    ) -> Callable[..., Any]:
        from kvpass.debug import stages
        from kvpass.graph.dataflow import data_inputs
        from kvpass.proof.check_masks import check_masks
        from kvpass.proof.verify import verify
        from kvpass.runtime.bind import Bound
        from kvpass.sites.dense import dense_by_choice

        record.plan = planned
        log.info("graph %d: %s", len(self.graphs), planned)
        inputs = [example(n) for n in lowered.gm.graph.nodes if n.op == "placeholder"]
        with stages(self.debug, len(self.graphs), gm, record, lowered):
            with record.timed("verify"), stage("verify"):
                verify(gm, lowered, planned)
                check_masks(gm, planned, lowered.bindings, example_inputs)
            title = record.title(len(self.graphs))
            about = lowered, planned, record, chosen, title
            captured = "" if self.mode == "default" else recorded(*about, self.recordings, self.verify, example_inputs)
            if isinstance(captured, str):
                begins = lowered.bindings[0].phase is Phase.PREFILL
                with record.timed("inner"):
                    inner = compile_inner(chosen, lowered.gm, inputs, title, example_inputs, begins)
            else:
                inner = captured.otherwise
        if self.verify:
            from kvpass.proof.check_sites import checked_once

            inner = checked_once(inner, gm, lowered, planned)
        watched, origin = data_inputs(gm.graph), self._origin(record.table)
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        dense = dense_by_choice(gm.graph, record.table.declined)
        steps, shared = planned.steps, planned.inputs
        replayed = (None, captured) if isinstance(captured, str) else (captured, "")
        bound = origin, watched, steps, shared, names, dense
        return Bound(inner, lowered.bindings, lowered.outputs, *bound, *replayed)

    def __reduce__(self) -> Any:
        """Graphs are not pickled: whoever loads it compiles anew."""
        options = self.policy, self.inner, self.strict, self.debug, self.verify, self.patterns, self.mode, self.part
        return Backend, options

    def _origin(self, table: SiteTable) -> Origin:
        """What the caches of a graph remember of who made them."""
        from kvpass.runtime.identity import Origin

        declined = tuple(d.to_dict() for d in table.declined)
        part = str(self.part) if self.part is not None else ""
        return Origin(self.policy.name, self.policy.asked, declined, self.policy.fingerprint, part=part)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent, by stage, over all graphs; `capture` is Dynamo's own time for the same graphs."""
        total: dict[str, float] = {"capture": capture_seconds(self.graphs)}
        for record in self.graphs:
            for name, seconds in record.seconds.items():
                total[name] = total.get(name, 0.0) + seconds
        return total


setattr(Backend, MARK, True)
