"""`kvpass.explain`: what would happen to a model, before any rewrite, in its prompt and in the steps after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvpass.api.next_step import GIVE_A_STEP, NoStep, StepLike, next_call
from kvpass.errors import KVPassError, PolicyError
from kvpass.model.twin import twin
from kvpass.pipeline.arguments import check_model, checked_patterns
from kvpass.policy.policy import Policy
from kvpass.sites.table import SiteTable
from kvpass.terms import Phase

if TYPE_CHECKING:
    from kvpass.patterns import PatternSet
    from kvpass.plan.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """What would happen to the graphs of two calls. `str()` is for people.

    Attributes:
        tables: of each graph, in the order in which they were traced, its sites: matched (`.sites`), declined
            (`.declined`, each with reason, node, source line and detail).
        plans: of each graph, what would replace its sites; empty without a policy.
        calls: for each graph `prefill` (the call that was given; `call` if it was a step itself) or `step` (the one
            after it).
        no_step: why no step was traced; "" if one was.
        inner: the inner compiler with its options, of a model that kvpass has compiled; else "".
    """

    tables: tuple[SiteTable, ...]
    plans: tuple[Plan, ...] = ()
    calls: tuple[str, ...] = ()
    no_step: str = ""
    inner: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `graphs`, each with `sites` and `declined`, `plans`, `calls`, `no_step` and `inner`."""
        return {
            "graphs": [t.to_dict() for t in self.tables],
            "plans": [p.to_dict() for p in self.plans],
            "calls": list(self.calls),
            "no_step": self.no_step,
            "inner": self.inner,
        }

    def __str__(self) -> str:
        lines, last = [], ""
        for number, (table, call) in enumerate(zip(self.tables, self.calls, strict=True), 1):
            lines += [f"{call}:"] if call != last else []
            lines.append(f"graph {number}: {table}")
            if not table:
                lines.append("  no attention with a KV cache: this graph goes to the inner compiler untouched")
            if self.plans:
                lines.append(str(self.plans[number - 1]))
            last = call
        lines += [f"step: not traced, {self.no_step}"] if self.no_step else []
        lines += [f"inner compiler: {self.inner}"] if self.inner else []
        return "\n".join(lines)


def explain(
    model: torch.nn.Module,
    *args: Any,
    policy: Any = None,
    budget: int | float | str | None = None,
    patterns: PatternSet | None = None,
    step: StepLike = None,
    **kwargs: Any,
) -> Explanation:
    """Run one call of the model unchanged, and the next token after it, and tell for each attention site: matched, or
    declined with reason, node, source line and hint.

    Args:
        model: any nn.Module; not modified.
        args, kwargs: one call's inputs, for example the tokenizer's output.
        policy, budget: also show the plan.
        patterns: recognisers; None for `kvpass.patterns.DEFAULT`.
        step: the inputs of the call after it: a dict of keyword arguments, a tuple of positional ones, or a function
            from the first call's output to either, `lambda out: {"ids": token, "past": out[1]}`. None: found out for
            models that return a `cache` or `past_key_values` field; for others only the first call is traced.

    Raises:
        ModelError: it is no model.
        PolicyError: bad policy, budget or pattern set, or a budget without a policy.
        KVPassError: torch traced nothing, with its reason.
    """
    from kvpass.model.dynamo import isolated, limits
    from kvpass.model.facade import Facade, uncompiled
    from kvpass.patterns import DEFAULT
    from kvpass.plan.plan import plan
    from kvpass.runtime.sharded import sharded

    check_model(model, "kvpass.explain")
    chosen_patterns = checked_patterns(patterns) or DEFAULT
    if policy is None and budget is not None:
        raise PolicyError("a budget, but no policy", where=f"budget={budget!r}", hint='give policy="h2o" too')
    chosen = Policy.load(policy).with_budget(budget) if policy is not None else None
    seen = _Seen(chosen_patterns)
    look = partial(isolated(seen), torch.nn.Module._call_impl, twin(uncompiled(model)))
    with limits(), torch.no_grad():
        output = look(*args, **kwargs)
        if not seen.tables:
            raise _nothing_traced()
        seen.begin_step()
        no_step = _take_step(model, look, args, kwargs, output, step)
    part = sharded(uncompiled(model))
    plans = tuple(plan(chosen, t, part) for t in seen.tables) if chosen is not None else ()
    inner = str(model.kvpass.inner) if issubclass(type(model), Facade) else ""
    return Explanation(tuple(seen.tables), plans, tuple(seen.calls), no_step, inner)


class _Seen:
    """A backend that scans each graph and runs it as it is."""

    def __init__(self, patterns: PatternSet) -> None:
        self.patterns, self.call = patterns, "prefill"
        self.tables: list[SiteTable] = []
        self.calls: list[str] = []

    def begin_step(self) -> None:
        """What follows is traced in a step. A first call of one token with a past was no prefill."""
        phases = {site.phase for table in self.tables for site in table}
        if phases == {Phase.DECODE}:
            self.calls = ["call"] * len(self.calls)
        self.call = "step"

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from kvpass.graph.plain import plain
        from kvpass.sites.scan import scan

        self.tables.append(scan(plain(gm), self.patterns))
        self.calls.append(self.call)
        return gm.forward


def _take_step(
    model: torch.nn.Module,
    look: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    step: StepLike,
) -> str:
    """Call the model again with one more token; why it was not, "" if it was."""
    try:
        more, given = next_call(model, args, kwargs, output, step)
    except NoStep as reason:
        return str(reason)
    try:
        look(*more, **given)
    except Exception as error:
        if step is not None:
            raise
        return f"it failed ({type(error).__name__}: {str(error).splitlines()[0]}); {GIVE_A_STEP}"
    return ""


def _nothing_traced() -> KVPassError:
    import torch._dynamo

    why = "Dynamo skipped the model: its forward or what wraps it is under torch._dynamo.disable, or a hook stops it"
    hint = "explain the module inside it; TORCH_LOGS=dynamo says which frame was skipped"
    if torch._dynamo.config.disable:
        why, hint = "Dynamo is disabled", "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"
    return KVPassError(f"torch traced no graph of this call. {why}", hint=hint)
