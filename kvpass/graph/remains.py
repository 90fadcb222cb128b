"""What a graph still computes of a cache when the attention over it is gone: only to read sizes of it."""

from __future__ import annotations

import torch
from torch import fx

from kvpass.graph.calls import example, is_metadata


def remains(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Tensors that are made of a node's data, with the tuples of their sizes, and the numbers that are read of those;
    None if anything else becomes of them.
    """
    made = [user for user in node.users if not is_metadata(user)]
    numbers: list[fx.Node] = []
    for current in made:
        for user in current.users:
            if user.op == "output" or (isinstance(example(current), tuple) and not is_number(user)):
                return None
            if is_number(user):
                numbers.append(user)
            elif user not in made:
                made.append(user)
    return made, list(dict.fromkeys(numbers))


def is_number(node: fx.Node) -> bool:
    """A size, or what is computed of sizes."""
    return isinstance(example(node), (int, torch.SymInt))
