"""Sparse indexers (DeepSeek-V3.2): cached keys that only choose which tokens an attention may see."""

from __future__ import annotations

from torch import fx

from kvpass.graph.calls import call_name, changes, is_metadata, operand
from kvpass.graph.dataflow import Flow

CHOICES = frozenset({"topk", "sort", "argsort"})
SHAPED = frozenset({"ones_like", "zeros_like", "empty_like", "new_ones", "new_zeros", "new_empty"})
"""New tensors of the shape or dtype of another; they read nothing else of it."""
LIMIT = 100
"""Nodes looked at below a cache: several times what any indexer has."""


def choice_below(flow: Flow, cache: fx.Node) -> fx.Node | None:
    """A choice of tokens, if all that is computed from a cache ends in such choices, of which only the places are read;
    None if anything else comes of it.
    """
    queue: list[fx.Node] = [cache]
    choice = None
    for node in queue:
        for user in node.users:
            if is_metadata(user) or call_name(user) in SHAPED or user in queue:
                continue
            if user is flow.output and node is cache:
                continue
            if call_name(user) in CHOICES and _only_places(user):
                choice = user
            elif _spreads(user, node) or len(queue) > LIMIT:
                return None
            else:
                queue.append(user)
    return choice


def _spreads(user: fx.Node, node: fx.Node) -> bool:
    """Does a value get somewhere that its users do not show, or into weights over the keys?"""
    elsewhere = (changes(user) and operand(user) is not node) or "out" in user.kwargs
    return user.op == "output" or elsewhere or call_name(user) in CHOICES | {"softmax"}


def _only_places(choice: fx.Node) -> bool:
    """`.indices` or `[1]` of a topk or a sort."""
    if call_name(choice) == "argsort":
        return True
    readers = [user for user in choice.users if not is_metadata(user)]
    places = (("getitem", 1), ("getattr", "indices"))
    return bool(readers) and all((call_name(user), *user.args[1:2]) in places for user in readers)
