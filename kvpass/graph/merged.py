"""Caches that are read with sequences and heads in one axis, and kept with the two apart: fairseq's prev_key.

    k = cat([past.view(B * H, T, D), new], 1);  kept = k.view(B, H, -1, D)

is `kept = cat([past, new.view(B, H, -1, D)], 2)`, of which the attention reads a view: rewritten so, it is a cache like
others. In a first call, of new keys alone, the view is taken of what is kept too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, example, is_input, operand
from kvpass.graph.making import made
from kvpass.graph.nearby import from_input
from kvpass.graph.shapes import normal_dim, same, shape_of


class Merged(NamedTuple):
    """`node`, of three axes, and what is kept of it: a view of four."""

    node: fx.Node
    kept: fx.Node


def found(graph: fx.Graph) -> list[Merged]:
    """All that can be written otherwise."""
    returned = dict.fromkeys(graph.find_nodes(op="output")[0].all_input_nodes)
    found = (Merged(operand(kept), kept) for kept in returned if call_name(kept) == "reshape")
    return [one for one in found if isinstance(one.node, fx.Node) and one.node not in returned and _fits(one)]


def rewrite(graph: fx.Graph, one: Merged) -> None:
    """Keep what is grown with four axes, and read it with three."""
    node, kept = one
    batch, heads, _, width = shape_of(kept)
    if call_name(node) == "cat":
        past, new = argument(node, 0, "tensors")
        with graph.inserting_before(node):
            apart = made(graph, new, torch.reshape, new, (batch, heads, -1, width))
            whole = made(graph, node, torch.cat, [operand(past), apart], 2)
            seen = made(graph, node, torch.reshape, whole, (batch * heads, -1, width))
        kept.replace_all_uses_with(whole)
        graph.erase_node(kept)
        node.replace_all_uses_with(seen)
        graph.erase_node(node)
        if not past.users:
            graph.erase_node(past)
        return
    with graph.inserting_after(node):
        whole = made(graph, node, torch.reshape, node, (batch, heads, -1, width))
    with graph.inserting_after(whole):
        seen = made(graph, node, torch.reshape, whole, (batch * heads, -1, width))
    kept.replace_all_uses_with(whole)
    graph.erase_node(kept)
    node.replace_all_uses_with(seen, delete_user_cb=lambda user: user is not whole)


def _fits(one: Merged) -> bool:
    """Sequences and heads, of known numbers, in one axis in front of the tokens; grown along these, if it grows."""
    node, sizes, apart = one.node, shape_of(one.node), shape_of(one.kept)
    if len(sizes) != 3 or len(apart) != 4 or node.op == "placeholder" or not example(node).is_floating_point():
        return False
    known = all(isinstance(size, int) for size in (*apart[:2], apart[3]))
    if not known or apart[0] * apart[1] != sizes[0] or apart[3] != sizes[2] or not same(apart[2], sizes[1]):
        return False
    if call_name(node) != "cat":
        return not from_input(node)
    pair: Any = argument(node, 0, "tensors")
    if len(pair) != 2 or normal_dim(argument(node, 1, "dim", 0), 3) != 1 or call_name(pair[0]) != "reshape":
        return False
    past = operand(pair[0])
    held = shape_of(past)
    return is_input(past) and len(held) == 4 and (*held[:2], held[3]) == (*apart[:2], apart[3])
