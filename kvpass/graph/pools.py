"""Paged caches: rows of all sequences in one pool, written and gathered by tables of indices (transformers' continuous
batching: `index_copy_` on [rows, H, D], then `index_select`; blocks: `pool[table]`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example
from kvpass.graph.indices import index_of
from kvpass.graph.nearby import whole
from kvpass.graph.shapes import shape_of

_GATHERS = frozenset({"index_select", "gather", "take_along_dim", "index", "embedding"})


def gathered(base: fx.Node) -> fx.Node | None:
    """The node that gathers a value out of another by a tensor of indices."""
    return next((node for node in whole(base) if call_name(node) in _GATHERS or _by_tensor(node)), None)


def writes_rows(write: fx.Node) -> bool:
    """Does a write put tokens, without an axis of sequences, into rows of a pool [rows, H, D], or of its blocks?"""
    buffer: Any = argument(write, 0, "input")
    if call_name(write) in ("index_copy", "index_copy_"):
        return len(shape_of(buffer)) == 3 and argument(write, 1, "dim") in (0, -3)
    if call_name(write) in ("setitem", "index_put", "index_put_"):
        index = index_of(write)
        tensors = [item for item in index if _is_tensor(item)]
        return bool(tensors) and _is_tensor(index[0]) and len(shape_of(buffer)) - len(tensors) == 2
    return False


def _by_tensor(node: fx.Node) -> bool:
    if call_name(node) != "getitem":
        return False
    return any(_is_tensor(item) for item in index_of(node))


def _is_tensor(item: Any) -> bool:
    value = example(item) if isinstance(item, fx.Node) else None
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype is not torch.bool
