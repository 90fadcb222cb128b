"""Which cached head each query head reads, found by running the nodes in between on numbered entries.

For attentions that take the heads of their values apart and put them together otherwise (Differential Transformer,
arXiv 2410.05258: halves of the value heads side by side), where views alone cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import call_name, called, example, operand
from kvpass.graph.shapes import shape_of
from kvpass.graph.views import is_view

_MOVES = frozenset({"getitem", "chunk", "split", "split_with_sizes", "cat", "stack", "narrow", "select", "unbind"})
LIMIT = 60
ANY = 3
"""Value of every symbol in sizes while the nodes are run."""

Heads = tuple[tuple[int, ...], ...]
"""For each block of the last axis: the cached head that each query head reads."""


def mixed_from(node: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[fx.Node, list[fx.Node]] | None:
    """The one value that a tensor is rearranged from, and the nodes that do it, in order; None if something computes.

    Args:
        stop: where to stop; reaching anything else that is no rearrangement gives None.
    """
    found: list[fx.Node] = []
    sources: set[fx.Node] = set()
    queue = [node]
    for current in queue:
        if stop(current):
            sources.add(current)
            continue
        if not (is_view(current) or call_name(current) in _MOVES) or len(queue) > LIMIT:
            return None
        found.append(current)
        above = [n for n in current.all_input_nodes if shape_of(n) or isinstance(example(n), (tuple, list))]
        queue += [n for n in above if n not in queue]
    order = {n: at for at, n in enumerate(node.graph.nodes)}
    return (sources.pop(), sorted(found, key=order.__getitem__)) if len(sources) == 1 else None


def heads_read(base: fx.Node, nodes: list[fx.Node], result: fx.Node, roles: str) -> Heads | None:
    """Which head of `base`, cached as [B, H, T, D], each query head reads, for each D entries of the result.

    Args:
        roles: axes of the result, by the letters of `kvpass.sites.site.Axes`.

    Returns None if tokens, sequences or entries within a head change places.
    """
    sizes = [_concrete(size) for size in shape_of(base)]
    if len(sizes) != 4 or sorted(roles) != sorted("BHTD"):
        return None
    batch, heads, tokens, dim = sizes
    order = [roles.index(letter) for letter in "BHTD"]
    row = torch.arange(batch * tokens).view(batch, 1, tokens, 1).expand(sizes)
    entry = torch.arange(heads * dim).view(1, heads, 1, dim).expand(sizes)
    rows, entries = (_run(nodes, base, result, ids).permute(order) for ids in (row, entry))
    if (rows.shape[0], rows.shape[2]) != (batch, tokens):
        return None
    if not torch.equal(rows, row[:, :1, :, :1].expand(rows.shape)):
        return None
    read = entries[0, :, 0]
    if not torch.equal(entries, read[None, :, None].expand(entries.shape)) or read.shape[1] % dim:
        return None
    blocks = read.unflatten(1, (-1, dim))
    head = blocks[..., 0] // dim
    if not torch.equal(blocks, head[..., None] * dim + torch.arange(dim)):
        return None
    return tuple(tuple(column) for column in head.T.tolist())


def _run(nodes: list[fx.Node], base: fx.Node, result: fx.Node, ids: torch.Tensor) -> torch.Tensor:
    """The rearrangement of `ids`; sizes in arguments become numbers."""
    values: dict[fx.Node, Any] = {base: ids}

    def value(n: fx.Node) -> Any:
        return values[n] if n in values else _concrete(example(n))

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
        if call_name(node) in ("to", "float", "type_as"):
            values[node] = value(operand(node))  # numbers stay numbers
        else:
            values[node] = called(node, args, kwargs)
    found: torch.Tensor = values[result]
    return found


def _concrete(size: Any) -> Any:
    """A size with a number for each symbol."""
    if not isinstance(size, torch.SymInt):
        return size
    expr = size.node.expr
    return int(expr.subs(dict.fromkeys(expr.free_symbols, ANY)))
