"""Near misses: how far each core pattern got below a cache whose attention no pattern took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from kvpass.graph.calls import call_name, source_line
from kvpass.graph.miss import Miss

ENDS = frozenset({"linear", "addmm", "mm", "conv1d"})
"""The output projection: what lies below it is no longer this attention."""
LIMIT = 200


def near_misses(cores: Any, cache: fx.Node) -> tuple[str, ...]:
    """One line for each core pattern that takes any."""
    taking = (pattern for pattern in cores if not getattr(pattern, "refuses_all", False))
    return tuple(f"{pattern.name}: {_how_far(pattern, cache)}" for pattern in taking)


def _how_far(pattern: Any, cache: fx.Node) -> str:
    anchors: frozenset[str] = getattr(pattern, "anchors", frozenset())
    if not anchors:
        return "took no node"
    found = next((node for node in _below(cache) if call_name(node) in anchors), None)
    if found is None:
        return f"no call of {' or '.join(sorted(anchors))} reads {cache.name}"
    line = source_line(found)
    return f"{found.name}: {_why(pattern, found, cache)}" + (f" ({line})" if line else "")


def _why(pattern: Any, found: fx.Node, cache: fx.Node) -> str:
    try:
        if any(pattern.match(node) is not None for node in (found, *found.users)):
            return f"is an attention, but its keys and values are no views of {cache.name}"
    except Miss as miss:
        return f"stopped at {miss.node.name}: {miss.detail}"
    why_not = getattr(pattern, "why_not", None)
    return why_not(found) if why_not is not None else "is not in its form"


def _below(cache: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, directly or not, this side of the output projection; nearest first."""
    queue, seen = [cache], {cache}
    for node in queue:
        yield node
        if call_name(node) in ENDS or len(queue) > LIMIT:
            continue
        fresh = [user for user in node.users if user not in seen and user.op != "output"]
        seen.update(fresh)
        queue += fresh
