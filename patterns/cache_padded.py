"""A past and new tokens, both padded with zeros to the length of both and added: `F.pad(past, ..) + F.pad(new, ..)`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, is_input, operand
from kvpass.graph.shapes import same, shape_of


class Padded(NamedTuple):
    past: fx.Node
    new: fx.Node
    axis: int
    inner: tuple[fx.Node, ...]


def padded_sum(node: fx.Node) -> Padded | None:
    """The parts of such a sum; None if it is none."""
    parts = (argument(node, 0, "input"), argument(node, 1, "other"))
    if call_name(node) not in ("add", "iadd") or not all(isinstance(p, fx.Node) and _is_zero_pad(p) for p in parts):
        return None
    ends = [_ends(part) for part in parts]
    for at, other in ((0, 1), (1, 0)):
        past, new, of_past, of_new = operand(parts[at]), operand(parts[other]), ends[at], ends[other]
        if of_past is None or of_new is None or not is_input(past):
            continue
        (axis, before), (axis_of_new, before_new) = of_past, of_new
        fits = same(shape_of(node)[axis], shape_of(past)[axis] + shape_of(new)[axis])
        if axis == axis_of_new and same(before, 0) and same(before_new, shape_of(past)[axis]) and fits:
            return Padded(past, new, axis, parts)
    return None


def _is_zero_pad(node: fx.Node) -> bool:
    value, mode = argument(node, 3, "value"), argument(node, 2, "mode", "constant")
    return call_name(node) in ("pad", "constant_pad_nd") and mode in ("constant", 0) and value in (None, 0)


def _ends(node: fx.Node) -> tuple[int, Any] | None:
    """The only axis that is padded, and by how many in front."""
    pads: Any = argument(node, 1, "pad")
    rank = len(shape_of(node))
    if not isinstance(pads, (tuple, list)) or len(pads) % 2:
        return None
    sizes = [_number(pad) for pad in pads]
    if any(size is None for size in sizes):
        return None
    wide = {rank - 1 - at // 2: sizes[at // 2 * 2] for at, size in enumerate(sizes) if not same(size, 0)}
    return next(iter(wide.items())) if len(wide) == 1 else None


def _number(pad: Any) -> Any:
    value = example(pad) if isinstance(pad, fx.Node) else pad
    return value if isinstance(value, (int, torch.SymInt)) else None
