"""Views that leave nothing out and change no order: the tensor itself, in other words."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.aliases import aliases
from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.indices import END, by_axis, index_of
from kvpass.graph.shapes import same


def covers(node: fx.Node) -> bool:
    """A view of all of a tensor, in the same order."""
    above, name = operand(node), call_name(node)
    if not isinstance(above, fx.Node):
        return False
    before, after = example(above), example(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dim() != after.dim():
        return False
    if not all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True)):
        return False
    if name == "getitem":
        index = by_axis(index_of(node), before.dim())
        sizes = zip(index, before.shape, strict=False)
        return all(isinstance(item, slice) and item.step in (None, 1) and _covers(item, size) for item, size in sizes)
    if name == "slice":
        axis = argument(node, 1, "dim", 0)
        covered = slice(argument(node, 2, "start"), argument(node, 3, "end"))
        return argument(node, 4, "step", 1) == 1 and _covers(covered, before.shape[axis], far=END)
    return name in ("narrow", "expand", "alias") or _is_the_same(node, above)


def _is_the_same(node: fx.Node, above: fx.Node) -> bool:
    """`detach()` or `.data` where nothing has gradients; a copy that is returned in place of what it is made of."""
    name = call_name(node)
    if name in ("detach", "_get_data_attr"):
        return not torch.is_grad_enabled()
    if name not in ("clone", "contiguous") or node.kwargs:
        return False
    return (name == "contiguous" and call_name(above) == "cat") or _is_returned_alone(node, above)


def _is_returned_alone(copy: fx.Node, above: fx.Node) -> bool:
    """Is a copy all that the graph returns of a memory of its own, which nothing changes?"""
    if [user.op for user in copy.users] != ["output"]:
        return False
    shared = aliases(above) - {copy}
    users = [user for one in shared for user in one.users]
    return not any(one.op == "placeholder" for one in shared) and not any(u.op == "output" or changes(u) for u in users)


def _covers(item: slice, size: Any, far: int | None = None) -> bool:
    """Everything, of however many: a window (`[-w:]`, `[:w]`) covers its axis too, while that is short."""
    short = isinstance(item.stop, int) and item.stop != far and not same(item.stop, size)
    return item.start in (None, 0) and not short
