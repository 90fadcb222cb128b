"""What a graph still computes of a cache when the attention over it is gone: only to read sizes and the type of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import call_name, example, is_metadata, operand


class Remains(NamedTuple):
    """Attributes:
    made: tensors that are made of a node's data, with the tuples of their sizes.
    numbers: read of those.
    like: tensors of the type, or size, of one of those, with numbers of their own (`logits.new_ones(s, s)`).
    """

    made: list[fx.Node]
    numbers: list[fx.Node]
    like: list[fx.Node]


def remains(node: fx.Node) -> Remains | None:
    """What is left of a node's data; None if anything else becomes of it."""
    found = Remains([user for user in node.users if not is_metadata(user)], [], [])
    for current in found.made:
        for user in current.users:
            if user.op == "output" or (isinstance(example(current), tuple) and not is_number(user)):
                return None
            kind = found.numbers if is_number(user) else found.like if _is_like(user, current) else found.made
            if user not in kind:
                kind.append(user)
    return found


def _is_like(user: fx.Node, node: fx.Node) -> bool:
    """A tensor for which another says type and device, and perhaps the sizes, but none of its numbers."""
    return operand(user) is node and (call_name(user).startswith("new_") or call_name(user).endswith("_like"))


def is_number(node: fx.Node) -> bool:
    """A size, or what is computed of sizes."""
    return isinstance(example(node), (int, torch.SymInt))
