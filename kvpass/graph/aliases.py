"""Values that share memory, and what changes them in place."""

from __future__ import annotations

from torch import fx

from kvpass.graph.calls import call_name, changes, operand
from kvpass.graph.views import is_view

_SLICES = frozenset({"getitem", "slice", "narrow", "select", "chunk", "split", "unbind", "detach", "alias", "diagonal"})


def aliases(node: fx.Node, limit: int = 200) -> set[fx.Node]:
    """A value, what it is a view of, and the views of those: all that may share its memory."""
    top = node
    while (is_view(top) or call_name(top) in _SLICES) and isinstance(operand(top), fx.Node):
        top = operand(top)
    found, queue = {top, node}, [top, node]
    for current in queue:
        below = [
            user
            for user in current.users
            if user not in found and operand(user) is current and (is_view(user) or call_name(user) in _SLICES)
        ]
        found.update(below)
        queue += below[: limit - len(queue)]
    return found


def changed(node: fx.Node, after: int, before: int, order: dict[fx.Node, int]) -> fx.Node | None:
    """What changes a value in place between two places of the graph, both excluded."""
    for alias in aliases(node):
        for user in alias.users:
            if changes(user) and operand(user) is alias and after < order[user] < before:
                return user
    return None
