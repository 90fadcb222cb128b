"""What a node changes in place, and which memory its value lies in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, changes, example, operand


def memory_of(node: fx.Node) -> int | None:
    """What tells a fake tensor's memory from that of others; None of what is no tensor."""
    value = example(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Values that a node changes in place."""
    found: list[Any] = [operand(node)] if changes(node) or node.kwargs.get("inplace") is True else []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        found += [argument(node, at, a.name) for at, a in enumerate(schema) if a.alias_info and a.alias_info.is_write]
    found.append(node.kwargs.get("out"))
    return (value for value in found if isinstance(value, fx.Node))
