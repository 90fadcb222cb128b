"""A captured graph in plainer words: without the views that change nothing (slices that cover their axis, `expand` to
the same sizes, `detach`, a copy in place of a cache), with stacks grown as a whole (`kvpass.graph.stacks`), caches of
four axes that are read with three (`kvpass.graph.merged`), and entries of stacks taken first (`kvpass.graph.entries`).

`kept = k[..., 0:, :]` is the cache, not a part of it. Patterns and rules need not know such spellings.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from kvpass.graph import entries, merged, stacks
from kvpass.graph.calls import call_name, operand
from kvpass.graph.covering import covers

SPELLINGS = (entries, stacks, merged)
"""Each finds what can be written otherwise, `found(graph)`, and writes one of it so, `rewrite(graph, one)`."""


def plain(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph so; itself if it is plain. The given graph is not modified."""
    idle = [node for node in gm.graph.nodes if _is_idle(node)]
    if not idle and not any(spelling.found(gm.graph) for spelling in SPELLINGS):
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
    for spelling in SPELLINGS:
        for one in spelling.found(graph):
            spelling.rewrite(graph, one)
    with _use_lazy_graph_module(True):
        result = _make_graph_module(gm, graph, class_name="GraphModule")
    result.meta.update(gm.meta)
    return result


def _is_idle(node: fx.Node) -> bool:
    """A view of all of a tensor; an input that is only returned stays a tensor of its own, and what `copy_` writes into
    says on which axis the tokens are.
    """
    above = operand(node)
    written = any(call_name(user) == "copy_" and operand(user) is node for user in node.users)
    if written or not isinstance(above, fx.Node) or not covers(node):
        return False
    return above.op != "placeholder" or not any(user.op == "output" for user in node.users)
