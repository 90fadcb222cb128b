"""Composition root: scan -> plan -> lower -> verify -> inner compiler -> bind. The only importer of
`patterns.DEFAULT`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvpass.errors import DeclinedError, KVPassError, TrainingError
from kvpass.graph.calls import example
from kvpass.pipeline.arguments import check_options, checked_patterns
from kvpass.pipeline.conditions import MARK, decided_from_now_on
from kvpass.pipeline.graphs import GraphRecord, Graphs, capture_seconds
from kvpass.pipeline.inner import compile_inner
from kvpass.policy.policy import Policy
from kvpass.runtime.active import current
from kvpass.sites.table import SiteTable
from kvpass.terms import Phase

if TYPE_CHECKING:
    from kvpass.lowering.lower import Lowered
    from kvpass.runtime.captured import Captured
    from kvpass.runtime.identity import Origin
    from kvpass.runtime.recordings import Recordings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A `torch.compile` backend with a policy baked in. Equal options give equal, hash-equal backends, so Dynamo does
    not recompile.

    Attributes:
        policy: checked, with its budget.
        inner: `inductor`, `aot_eager` or `eager`: who compiles the rewritten graph.
        strict: a declined site is an error; else it stays dense, correct and reported.
        debug: folder for the debug report, or None.
        verify: check each site at full budget against the unmodified subgraph on the first real inputs.
        patterns: recognisers; None for `kvpass.patterns.DEFAULT`.
        mode: `default`, or `reduce-overhead`: steps are CUDA graphs.
        graphs: records of the graphs compiled so far (not part of equality); printed, a table.
        recordings: what a device has recorded of their steps, once it has (likewise).
    """

    policy: Policy
    inner: str = "inductor"
    strict: bool = True
    debug: str | None = None
    verify: bool = False
    patterns: Any = None
    mode: str = "default"
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
                return _Refusal(error)
            return replace(self, mode=mode)(gm, example_inputs)
        call = current()
        if call is not None:
            call.compiling()
        else:
            decided_from_now_on()
        try:
            return self._compile(gm, example_inputs)
        except KVPassError as error:
            log.info("refused: %s", error)
            return _Refusal(error)

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from kvpass.debug import stages
        from kvpass.graph.dataflow import data_inputs
        from kvpass.graph.plain import plain
        from kvpass.patterns import DEFAULT
        from kvpass.runtime.untouched import Untouched
        from kvpass.sites.dense import dense_by_choice
        from kvpass.sites.scan import scan

        start = time.perf_counter()
        gm = plain(gm)
        table = scan(gm, self.patterns or DEFAULT)
        record = GraphRecord(table, seconds={"scan": time.perf_counter() - start})
        self.graphs.append(record)
        log.info("graph %d: %s", len(self.graphs), table)
        if self.strict and table.failed:
            with stages(self.debug, len(self.graphs), gm, record, None):
                raise _strict_error(table)
        if not table.sites:
            call = current()
            chosen = self.inner if call is None or call.whole else "eager"  # an encoder or a head, called alone
            with stages(self.debug, len(self.graphs), gm, record, None), record.timed("inner"):
                inner = compile_inner(chosen, gm, example_inputs)
            left = self._origin(table) if table.declined else None
            return Untouched(inner, data_inputs(gm.graph), dense_by_choice(gm.graph, table.declined), left)
        _refuse_training(table)
        return self._rewrite(gm, example_inputs, record)

    def _rewrite(self, gm: fx.GraphModule, example_inputs: list[Any], record: GraphRecord) -> Callable[..., Any]:
        from kvpass.debug import stages
        from kvpass.graph.dataflow import data_inputs
        from kvpass.lowering.lower import lower
        from kvpass.plan.plan import plan
        from kvpass.proof.check_masks import check_masks
        from kvpass.proof.verify import verify
        from kvpass.runtime.bind import Bound
        from kvpass.sites.dense import dense_by_choice

        with record.timed("plan"):
            record.plan = plan(self.policy, record.table)
        with record.timed("lower"):
            lowered = lower(gm, record.plan)
        log.info("graph %d: %s", len(self.graphs), record.plan)
        inputs = [example(n) for n in lowered.gm.graph.nodes if n.op == "placeholder"]
        with stages(self.debug, len(self.graphs), gm, record, lowered):
            with record.timed("verify"):
                verify(gm, lowered, record.plan)
                check_masks(gm, record.plan, lowered.bindings, example_inputs)
            title = _title(len(self.graphs), record.table)
            captured = self._captured(lowered, record, title)
            if isinstance(captured, str):
                with record.timed("inner"):
                    inner = compile_inner(self.inner, lowered.gm, inputs, title)
            else:
                inner = captured.otherwise
        if self.verify:
            from kvpass.proof.check_sites import checked_once

            inner = checked_once(inner, gm, lowered, record.plan)
        watched, origin = data_inputs(gm.graph), self._origin(record.table)
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        dense = dense_by_choice(gm.graph, record.table.declined)
        steps, shared = record.plan.steps, record.plan.inputs
        recorded = (None, captured) if isinstance(captured, str) else (captured, "")
        about = origin, watched, steps, shared, names, dense
        return Bound(inner, lowered.bindings, lowered.outputs, *about, *recorded)

    def _captured(self, lowered: Lowered, record: GraphRecord, title: str) -> Captured | str:
        """The graph in the form that a device records; or why its steps are launched, "" if nobody asked."""
        from kvpass.lowering.static import static
        from kvpass.runtime.captured import Captured
        from kvpass.runtime.graph_device import DEVICES
        from kvpass.runtime.recordings import Recordings

        if self.mode == "default" or lowered.bindings[0].phase is not Phase.DECODE:
            return ""
        kind = lowered.bindings[0].device.type
        if kind not in DEVICES:
            return f"a {kind} records no graphs"
        if self.verify:
            return "verify=True looks into the first call of each graph"
        assert record.plan is not None
        with record.timed("lower"):
            found = static(lowered, record.plan)
        if isinstance(found, str):
            log.info("graph %d is not static: %s", len(self.graphs), found)
            return found
        inputs = [example(n) for n in found.gm.graph.nodes if n.op == "placeholder"]
        with record.timed("inner"):
            run = compile_inner(self.inner, found.gm, inputs, title)
        if not self.recordings:
            self.recordings.append(Recordings(DEVICES[kind]))
        return Captured(run, lowered.gm.forward, found.feeds, self.recordings[0])

    def __reduce__(self) -> Any:
        """Graphs are not pickled: whoever loads it compiles anew."""
        return Backend, (self.policy, self.inner, self.strict, self.debug, self.verify, self.patterns, self.mode)

    def _origin(self, table: SiteTable) -> Origin:
        """What the caches of a graph remember of who made them."""
        from kvpass.runtime.identity import Origin

        declined = tuple(d.to_dict() for d in table.declined)
        return Origin(self.policy.name, self.policy.budget, declined, self.policy.fingerprint)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent, by stage, over all graphs; `capture` is Dynamo's own time for the same graphs."""
        total: dict[str, float] = {"capture": capture_seconds(self.graphs)}
        for record in self.graphs:
            for stage, seconds in record.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total


setattr(Backend, MARK, True)


def _title(number: int, table: SiteTable) -> str:
    """What is told of a graph while it is compiled."""
    phases = sorted({site.phase.value for site in table})
    return f"graph {number} ({' and '.join(phases)}, {len(table.sites)} layers)"


class _Refusal:
    """Stands in for a compiled graph and raises the reason: Dynamo would wrap an exception of a backend."""

    def __init__(self, error: KVPassError) -> None:
        self.error = error

    def __call__(self, *args: Any) -> Any:
        raise self.error


def _strict_error(table: SiteTable) -> DeclinedError:
    first = table.failed[0]
    listed = "\n".join(f"  {d}" for d in table.failed[:8])
    more = f"\n  ... and {len(table.failed) - 8} more" if len(table.failed) > 8 else ""
    return DeclinedError(
        f"{len(table.failed)} attention site(s) with a KV cache cannot be rewritten:\n{listed}{more}",
        where=f"{first.site}, {first.source}",
        hint=f"{first.hint}; or pass strict=False to leave such sites dense",
    )


def _refuse_training(table: SiteTable) -> None:
    for site in table:
        halves = (site.key.update.new, site.value.update.new)
        if torch.is_grad_enabled() and any(example(node).requires_grad for node in halves):
            raise TrainingError(
                "K and V require grad: an evicting cache has no gradients",
                where=f"{site.name}, {site.source}",
                hint="call the model under torch.no_grad() or torch.inference_mode(), as generate() does",
            )


def backend(
    policy: str | Policy | dict[str, Any] = "h2o",
    budget: int | float | None = None,
    *,
    inner: str = "inductor",
    strict: bool = True,
    debug: bool | str | PathLike[str] | None = None,
    verify: bool = False,
    patterns: Any = None,
    mode: str = "default",
) -> Backend:
    """A backend object for `torch.compile(model, backend=kvpass.backend("h2o", 0.2))`. Arguments as for
    `kvpass.compile`.

    Raises:
        PolicyError: bad policy, budget or option.
    """
    from kvpass.debug import debug_folder

    check_options(inner=inner, strict=strict, debug=debug, verify=verify, mode=mode)
    patterns, checked = checked_patterns(patterns), Policy.load(policy).with_budget(budget)
    return Backend(checked, inner, strict, debug_folder(debug), verify, patterns, mode)


_FROM_OPTIONS: dict[str, Backend] = {}


def from_options(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Entry point of `torch.compile(model, backend="kvpass", options={"policy": ..., "budget": ...})`.

    Raises:
        PolicyError: unknown option, with the valid ones (when the compiled model is called).
    """
    from kvpass.errors import PolicyError

    given = (options or {}) | ({"mode": mode} if mode is not None else {})
    valid = ("policy", "budget", "inner", "strict", "debug", "verify", "mode")
    try:
        unknown = sorted(set(given) - set(valid))
        if unknown:
            raise PolicyError(f"unknown option {unknown[0]!r}", hint=f"options are {', '.join(valid)}")
        key = repr(sorted(given.items()))
        if key not in _FROM_OPTIONS:
            _FROM_OPTIONS[key] = backend(**given)
        return _FROM_OPTIONS[key](gm, example_inputs)
    except KVPassError as error:
        return _Refusal(error)


setattr(from_options, MARK, True)
