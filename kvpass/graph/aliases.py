"""Values that share memory, and what changes them in place."""

from __future__ import annotations

from torch import fx

from kvpass.graph.calls import call_name, changes, operand
from kvpass.graph.views import is_view

_SLICES = frozenset({"getitem", "slice", "narrow", "select", "chunk", "split", "unbind", "detach", "alias", "diagonal"})


_CASTS = frozenset({"to", "type", "type_as", "bool", "float", "half", "bfloat16", "int", "long", "contiguous"})
"""Copies, but of a tensor that is as they would make it: then they are it."""


def aliases(node: fx.Node, limit: int = 200, casts: bool = False) -> set[fx.Node]:
    """A value, what it is a view of, and the views of those: all that may share its memory.

    casts: count those that copy nothing where nothing changes.
    """

    def shares(other: fx.Node) -> bool:
        name = call_name(other)
        return is_view(other) or name in _SLICES or (casts and name in _CASTS)

    top = node
    while shares(top) and isinstance(operand(top), fx.Node):
        top = operand(top)
    found, queue = {top, node}, [top, node]
    for current in queue:
        below = [user for user in current.users if user not in found and operand(user) is current and shares(user)]
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
