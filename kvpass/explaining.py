"""`kvpass.explain`: what would happen to a model, before any rewrite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from kvpass.plan import Plan, plan
from kvpass.policy.spec import Policy
from kvpass.site import SiteTable
from kvpass.twin import twin

if TYPE_CHECKING:
    from kvpass.patterns import PatternSet


@dataclass(frozen=True)
class Explanation:
    """What would happen to the graphs of one call. `str()` is for people.

    Attributes:
        tables: of each graph, its sites: matched (`.sites`), declined (`.declined`, each with reason, node, source line
            and detail).
        plans: of each graph, what would replace its sites; empty without a policy.
    """

    tables: tuple[SiteTable, ...]
    plans: tuple[Plan, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `graphs`, each with `sites` and `declined`, and `plans`."""
        return {"graphs": [t.to_dict() for t in self.tables], "plans": [p.to_dict() for p in self.plans]}

    def __str__(self) -> str:
        lines = []
        for number, table in enumerate(self.tables, 1):
            lines.append(f"graph {number}: {table}")
            if not table:
                lines.append("  no attention with a KV cache: this graph goes to the inner compiler untouched")
            if self.plans:
                lines.append(str(self.plans[number - 1]))
        return "\n".join(lines)


def explain(
    model: torch.nn.Module,
    *args: Any,
    policy: Any = None,
    budget: int | float | None = None,
    patterns: PatternSet | None = None,
    **kwargs: Any,
) -> Explanation:
    """Run one call of the model unchanged and tell for each attention site: matched, or declined with reason, node,
    source line and hint.

    Args:
        model: any nn.Module; not modified.
        args, kwargs: one call's inputs, for example the tokenizer's output.
        policy, budget: also show the plan.
        patterns: recognisers; None for `kvpass.patterns.DEFAULT`.

    Raises:
        PolicyError: bad policy or budget.
    """
    from kvpass.patterns import DEFAULT
    from kvpass.scan import scan

    chosen = Policy.load(policy).with_budget(budget) if policy is not None else None
    tables: list[SiteTable] = []

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        tables.append(scan(gm, patterns or DEFAULT))
        return gm.forward

    looked_at = twin(model)
    looked_at.compile(backend=look)
    with torch.no_grad():
        looked_at(*args, **kwargs)
    return Explanation(tuple(tables), tuple(plan(chosen, t) for t in tables) if chosen is not None else ())
