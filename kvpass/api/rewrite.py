"""`kvpass.rewrite`: an exported decode step becomes one that keeps an evicting cache in explicit tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvpass.errors import DeclinedError, PolicyError
from kvpass.kernels.budget import kept
from kvpass.kernels.slots.state import State, fields_of
from kvpass.pipeline.arguments import check_options, check_program, checked_patterns
from kvpass.policy.policy import Policy
from kvpass.sites.table import SiteTable
from kvpass.terms import CacheForm, Phase

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from kvpass.lowering.lower import Lowered
    from kvpass.plan.plan import Plan
    from kvpass.runtime.binding import Binding


@dataclass(frozen=True)
class Rewritten:
    """A decode step with an evicting cache: `(inputs.., tokens, state..) -> (outputs.., new state..)`.

    Attributes:
        graph_module: the step as a graph of the original's ops and one `kvpass::decode_step` for each site, which
            changes nothing in place.
        inputs: names of its inputs in order: the original ones without the past K and V, `tokens` (int, the logical
            length so far), then the state tensors of each site (docs/export.md).
        outputs: names of its outputs in order: the original ones that are no cache, then the new state.
        plan, table: what was decided, what was found.
        bindings: of each site, in order: rule, dtype and device of its state.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plan: Plan
    table: SiteTable
    bindings: tuple[Binding, ...]

    @cached_property
    def program(self) -> ExportedProgram:
        """The step as an ExportedProgram; `tokens` and the number of slots may change from call to call."""
        from kvpass.lowering.exported import exported

        return exported(self.graph_module)

    def empty_state(self, tokens: int = 1, batch: int | None = None) -> list[torch.Tensor]:
        """The state before the first token, with room for `tokens` tokens: its tensors for each site, in order.

        batch: only if the program was exported with a dynamic batch.

        Raises:
            ValueError: the batch is dynamic and none is given.
        """
        from kvpass.runtime.room import empty_state

        state: list[torch.Tensor] = []
        for binding, site in zip(self.bindings, self.table, strict=True):
            sizes = {letter: site.dims[letter] for letter in ("B", "Hkv", "D", "Dv")}
            if not isinstance(sizes["B"], int):
                if batch is None:
                    raise ValueError("this program takes any batch: say which, empty_state(tokens, batch=..)")
                sizes["B"] = batch
            like = torch.empty(0, dtype=binding.dtype, device=binding.device)
            state += empty_state(binding.rule, tokens, like, sizes).tensors()
        return state

    def step(
        self, *inputs: Any, tokens: int, state: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
        """Run one step and return (outputs that are no cache, new state); the given state stays as it is.

        Args:
            inputs: the original inputs, flat and in order, without the past K and V.
            tokens: logical length of the cache before this step, padding included.
            state: of `empty_state` or of the step before. It grows by itself when it is full.

        Raises:
            CacheError: inside a block of `kvpass.marked`, which no policy of `kvpass.rewrite` reads.
        """
        from kvpass.runtime.room import with_room
        from kvpass.runtime.step import CallFacts

        call = CallFacts(inputs, self.bindings, 1, "Rewritten.step")
        for one in self.plan.steps:
            one.step.run(call.of(one.sites))
        left, given = list(state), list[torch.Tensor]()
        for rule in (binding.rule for binding in self.bindings):
            own, left = left[: len(fields_of(rule))], left[len(fields_of(rule)) :]
            given += with_room(State.of(own, rule), kept(rule, tokens + 1)).tensors()
        with torch.no_grad():
            results = self.graph_module(*inputs, tokens, *given)
        others = len(results) - len(given)
        return tuple(results[:others]), list(results[others:])

    def __str__(self) -> str:
        inputs, outputs = ", ".join(self.inputs), ", ".join(self.outputs)
        return f"{self.plan}\ninputs: {inputs}\noutputs: {outputs}"


def rewrite(
    program: ExportedProgram | fx.GraphModule,
    policy: str | Policy | dict[str, Any],
    budget: int | float | str | None = None,
    *,
    strict: bool = True,
    patterns: Any = None,
) -> Rewritten:
    """Rewrite an exported decode step (one token, past K and V as inputs, grown K and V as outputs) so that its cache
    evicts.

    Args:
        program: from `torch.export.export` with a dynamic past length, or a graph module of aten ops with fake
            values in its nodes' meta. It is left alone.
        policy, budget: as for `kvpass.compile`.
        strict: raise if a site with a cache cannot be rewritten; else it stays dense, past and all.
        patterns: recognisers; None for `kvpass.patterns.DEFAULT`.

    Raises:
        ModelError: it is no program.
        PolicyError: bad policy, budget or option, or one with scorers, value weights or uneven budgets.
        DeclinedError: a site cannot be rewritten (strict), nothing in the program is a cache, the program is no
            decode step, or its past has a fixed length.
    """
    from kvpass.graph.plain import plain
    from kvpass.lowering.lower import lower
    from kvpass.lowering.standalone import prepared, pure
    from kvpass.patterns import DEFAULT
    from kvpass.plan.on_ranks import check_exchanges
    from kvpass.plan.plan import plan
    from kvpass.proof.verify import verify
    from kvpass.sites.scan import scan

    check_program(program)
    check_options(strict=strict)
    found = checked_patterns(patterns) or DEFAULT
    chosen = Policy.load(policy).with_budget(budget)
    gm = prepared(program if isinstance(program, fx.GraphModule) else program.module(check_guards=False))
    gm = plain(gm)
    table = scan(gm, found, prove=False)  # other compilers get the mask as they know it
    _check(table, strict)
    planned = plan(chosen, table)
    check_exchanges(gm, chosen, [one.rule for one in planned.sites], None)
    _check_rules(planned)
    lowered = lower(gm, planned)
    verify(gm, lowered, planned)
    return _rewritten(pure(lowered), planned, table, lowered)


def _rewritten(gm: fx.GraphModule, planned: Plan, table: SiteTable, lowered: Lowered) -> Rewritten:
    from kvpass.graph.dataflow import flat_outputs

    inputs = tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder")
    state = inputs[len(inputs) - sum(map(len, lowered.states)) :]
    kept = flat_outputs(next(iter(reversed(gm.graph.nodes))))[: -len(state)]
    outputs = (*(getattr(value, "name", repr(value)) for value in kept), *state)
    return Rewritten(gm, inputs, outputs, planned, table, lowered.bindings)


def _check_rules(planned: Plan) -> None:
    from kvpass.kernels.decode_attend.functional import supports
    from kvpass.runtime.step import Moment

    wide = [one for one in planned.sites if not supports(one.rule)]
    # a program stands alone: nobody acts before or after its steps, or hands it more than state
    wide += [planned.sites[one.sites[0]] for one in planned.steps if one.step.moment is not Moment.CHECK]
    wide += planned.sites[:1] if planned.inputs else ()
    if wide:
        raise PolicyError(
            f"kvpass.rewrite cannot express policy {planned.policy.name!r}: it takes sums, squares and counts of "
            "attention, the same budget for all heads and layers, evicts in each step, and holds what the model has, "
            "or codes; what goes is dropped",
            where=f"{wide[0].site.name}, {wide[0].site.source}",
            hint="choose streaming_llm, h2o, tova, snapkv or roco, or use kvpass.compile",
        )


def _check(table: SiteTable, strict: bool) -> None:
    if strict and (declined := [d for d in table.declined if not d.reason.by_choice]):
        listed = "\n".join(map(str, declined[:8]))
        raise DeclinedError(
            f"{len(declined)} attention site(s) with a cache cannot be rewritten:\n{listed}",
            where=f"{declined[0].site}, {declined[0].source}",
            hint=f"{declined[0].hint}; or pass strict=False to leave such sites dense",
        )
    if not table.sites:
        raise DeclinedError(
            "no attention with a KV cache in this program",
            hint="the program must take the past K and V as inputs and return them grown; kvpass.explain shows what "
            "is found in a model",
        )
    buffered = next((site for site in table if site.key.update.form is CacheForm.BUFFER), None)
    if buffered is not None:
        raise DeclinedError(
            "the cache is a preallocated buffer",
            where=f"{buffered.name}, {buffered.source}",
            hint="export a step that grows its cache by torch.cat([past, new]); kvpass.compile takes buffers",
        )
    wrong = next((site for site in table if site.phase is not Phase.DECODE), None)
    if wrong is not None:
        raise DeclinedError(
            f"this is a {wrong.phase.value} program, and rewrite takes a decode step",
            where=f"{wrong.name}, {wrong.source}",
            hint="export one token with a past; prompts go through the step token by token",
        )
