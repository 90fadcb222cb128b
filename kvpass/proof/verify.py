"""Executable rules that every rewritten graph must satisfy before it is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from torch import fx

from kvpass.errors import VerificationError
from kvpass.graph.calls import example, is_metadata
from kvpass.graph.remains import is_number
from kvpass.lowering.lower import Lowered
from kvpass.plan.plan import Plan


def verify(original: fx.GraphModule, lowered: Lowered, plan: Plan) -> None:
    """Check a rewritten graph against its plan.

    Raises:
        VerificationError: the first broken rule; a bug in kvpass, never the user's fault.
    """
    nodes = list(lowered.gm.graph.nodes)
    _rule(_op_counts(nodes) == _planned_counts(plan), "the ops in the graph are those of the plan")
    _rule(_for_masks_alone(plan, lowered), "what is gone with a mask fed nothing else")
    gone = lowered.sizes_moved, lowered.masks_gone
    _rule(_untouched(original, nodes, plan, *gone), "nodes outside the sites are untouched")
    _rule(not _readers_of_past(original, lowered), "nothing reads a past cache as data")
    _rule(all("example_value" in n.meta for n in nodes if "kvpass" in n.meta), "new nodes carry their fake value")
    cached = sum(len(half) for b in lowered.bindings for half in (b.returned[:1] if b.joined else b.returned))
    _rule(len(nodes[-1].args[0]) + cached == lowered.outputs, "every output is either kept or a cache")
    _rule(
        len({at for b in lowered.bindings for half in b.returned for at in half}) == cached,
        "no output belongs to two caches",
    )


def _rule(holds: bool, what: str) -> None:
    if not holds:
        raise VerificationError(
            f"rewritten graph breaks a rule: {what}",
            hint="please report this with debug=True output; strict=False does not help",
        )


_BESIDE = ("kvpass.written", "kvpass.token_bounds", "kvpass.mask_spans")
"""Ops of a whole call, not of a site."""


def _op_counts(nodes: list[fx.Node]) -> Counter[str]:
    targets = (str(n.target) for n in nodes if n.op == "call_function")
    return Counter(t.split(".")[1] for t in targets if t.startswith("kvpass.") and not t.startswith(_BESIDE))


def _planned_counts(plan: Plan) -> Counter[str]:
    return Counter(op for planned in plan.sites for op in planned.ops)


def _for_masks_alone(plan: Plan, lowered: Lowered) -> bool:
    """Only attentions whose mask is proved, and what is gone too, read what is gone."""
    readers = {node for planned in plan.sites for node in planned.site.nodes} | lowered.masks_gone
    kept = {core.terms[at].node for p in plan.sites for core in p.site.cores for at in p.site.seen.read}
    gone = lowered.masks_gone - lowered.sizes_moved
    return not kept & gone and all(set(node.users) <= readers | lowered.sizes_moved for node in gone)


def _untouched(
    original: fx.GraphModule, nodes: list[fx.Node], plan: Plan, moved: Set[fx.Node], masks: Set[fx.Node]
) -> bool:
    """All nodes of no site are still there, in order, with the same target; but sizes may be read elsewhere."""
    if not all(is_metadata(node) or is_number(node) for node in moved):
        return False
    gone = moved | masks | {node for planned in plan.sites for node in planned.site.nodes}
    before = [(n.op, str(n.target)) for n in original.graph.nodes if n not in gone and n.op != "output"]
    after = iter([(n.op, str(n.target)) for n in nodes])
    return all(pair in after for pair in before)


def _readers_of_past(original: fx.GraphModule, lowered: Lowered) -> list[fx.Node]:
    inputs = [n for n in lowered.gm.graph.nodes if n.op == "placeholder"]
    pasts = [inputs[at] for b in lowered.bindings if b.past is not None for at in b.past]
    return [user for past in pasts if example(past) is not None for user in past.users if not is_metadata(user)]
