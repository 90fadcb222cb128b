"""What is said of a family's masks in a prompt, a step and a longer second turn, and what is left of them in graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from feed import Feed, prompt
from torch import fx

import kvpass
import kvpass.lowering.lower as lowering
from kvpass.graph.calls import example
from kvpass.graph.shapes import shape_of
from kvpass.plan.plan import Plan
from kvpass.terms import Phase

TURN = 5
"""Tokens of the second turn."""


def said(model: Any, padded: bool) -> dict[str, list[str]]:
    """By phase, what each of its masks was taken for.

    Raises:
        AssertionError: a tensor of queries times keys is left in a graph whose masks are all proved, and no other
            attention (a sliding layer, left dense) has one.
    """
    compiled = kvpass.compile(model, policy="full", inner="eager", strict=False)
    found: dict[str, set[str]] = {}
    with graphs() as made:
        feed, (ids, mask) = Feed(model, compiled), prompt(padded)
        try:
            _talk(feed, ids, mask)
        except Exception:
            if not made or not _fails_itself(model, padded):
                raise
    for plan, gm in made:
        for one in plan.sites:
            found.setdefault(one.site.phase.value, set()).add(str(one.site.seen))
        others = bool(plan.dense) or any(one.site.seen.why for one in plan.sites)
        left = [] if others else wide(plan, gm)
        assert not left, f"{plan.sites[0].site.phase.value}: {', '.join(left)} are queries times keys"
    return {phase: sorted(words) for phase, words in found.items()}


def _talk(feed: Feed, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """A prompt, two steps (the second is traced with lengths that change) and another turn."""
    logits = feed(ids, mask)
    for count in (1, 1, TURN):
        logits = feed(logits.argmax(-1, keepdim=True).expand(-1, count).contiguous())


def _fails_itself(model: Any, padded: bool) -> bool:
    """Minimax and prophetnet know no second turn of several tokens."""
    try:
        _talk(Feed(model, model), *prompt(padded))
    except Exception:
        return True
    return False


@contextmanager
def graphs() -> Iterator[list[tuple[Plan, fx.GraphModule]]]:
    """The rewritten graphs that are made within the block."""
    made: list[tuple[Plan, fx.GraphModule]] = []
    lower = lowering.lower

    def noted(gm: fx.GraphModule, plan: Plan) -> Any:
        lowered = lower(gm, plan)
        made.append((plan, lowered.gm))
        return lowered

    lowering.lower = noted
    try:
        yield made
    finally:
        lowering.lower = lower


def wide(plan: Plan, gm: fx.GraphModule) -> list[str]:
    """Nodes of a rewritten graph that are as wide as a mask of its attentions, [.., S, T], and are ours or made for a
    mask: a model may have others (blt counts bytes of patches so). With one query, a part that is added key by key is
    as wide.
    """
    made = {node.name for node in made_for_masks(plan)}
    sizes = {str_of(mask_size(one)) for one in plan.sites if not (one.site.seen.read and one.site.dims["S"] == 1)}
    found = [node for node in gm.graph.nodes if len(shape_of(node)) > 2 and str_of(shape_of(node)[-2:]) in sizes]
    return [node.name for node in found if node.name in made or "kvpass" in node.meta]


def made_for_masks(plan: Plan) -> set[fx.Node]:
    """Nodes of a captured graph that the masks of its sites are computed from."""
    queue = [term.node for one in plan.sites for core in one.site.cores for term in core.terms]
    found = set(queue)
    for node in queue:
        fresh = [above for above in node.all_input_nodes if above not in found]
        found.update(fresh)
        queue += fresh
    return found


def mask_size(planned: Any) -> tuple[Any, Any]:
    """Queries and keys of a site."""
    site = planned.site
    queries, update = site.dims["S"], site.key.update
    if site.phase is Phase.PREFILL:
        return queries, queries
    past = example(update.past)
    assert isinstance(past, torch.Tensor)
    length = past.shape[site.key.layout.token_axis]
    return queries, length + queries if update.form.value.startswith("cat") else length


def str_of(sizes: Any) -> str:
    """Equal for equal sizes, whatever symbols they are made of."""
    return " ".join(str(getattr(getattr(size, "node", None), "expr", size)) for size in sizes)
