"""A captured graph in plainer words: without the views that change nothing (slices that cover their axis, `expand` to
the same sizes, `detach`, a copy in place of a cache), and with stacks grown as a whole (`kvpass.graph.stacks`).

`kept = k[..., 0:, :]` is the cache, not a part of it. Patterns and rules need not know such spellings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.indices import END, by_axis, index_of
from kvpass.graph.shapes import same
from kvpass.graph.stacks import rewrite, stacks


def plain(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph so; itself if it is plain. The given graph is not modified."""
    idle = [node for node in gm.graph.nodes if _is_idle(node)]
    if not idle and not stacks(gm.graph):
        return gm
    graph = fx.Graph()
    copy: dict[fx.Node, fx.Node] = {}
    output: Any = graph.graph_copy(gm.graph, copy)
    for node in idle:
        above, ours = copy[operand(node)], copy[node]
        ours.replace_all_uses_with(above)
        copy[node] = above
        graph.erase_node(ours)
    last = next(iter(reversed(gm.graph.nodes)))
    output = fx.map_arg(last.args[0], copy.__getitem__)
    graph.output(output)
    for stack in stacks(graph):
        rewrite(graph, stack)
    with _use_lazy_graph_module(True):
        result = _make_graph_module(gm, graph, class_name="GraphModule")
    result.meta.update(gm.meta)
    return result


def _is_idle(node: fx.Node) -> bool:
    """A view of all of a tensor; an input that is only returned stays a tensor of its own."""
    above = operand(node)
    if not isinstance(above, fx.Node) or not covers(node):
        return False
    return above.op != "placeholder" or not any(user.op == "output" for user in node.users)


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
    if name == "contiguous" and call_name(above) == "cat":
        return True
    both = [user for one in (node, above) for user in one.users]
    kept = [any(user.op == "output" for user in one.users) for one in (node, above)]
    return kept == [True, False] and len(node.users) == 1 and not any(changes(user) for user in both)


def _covers(item: slice, size: Any, far: int | None = None) -> bool:
    """Everything, of however many: a window (`[-w:]`, `[:w]`) covers its axis too, while that is short."""
    short = isinstance(item.stop, int) and item.stop != far and not same(item.stop, size)
    return item.start in (None, 0) and not short
