"""Graph surgery around `lower` for programs that stand alone: no shells, no mutation, no past as an input.

`prepared` makes an exported graph readable for the scan; `pure` turns a lowered graph into one that takes `tokens`
(the logical length so far) and the state, and returns its outputs and the new state.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kvpass.errors import DeclinedError
from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.dataflow import flat_outputs
from kvpass.graph.shapes import normal_dim, same, shape_of
from kvpass.lowering.lower import Lowered
from kvpass.lowering.pure import FIRST, step_op
from kvpass.ops import decode_attend
from kvpass.runtime.binding import Binding

TOKENS = "tokens"
_RANGES = {"sym_constrain_range", "sym_constrain_range_for_size"}
_CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar"} | _RANGES)


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with flat outputs, without run-time checks and unread parts of tuples, and without what decomposing SDPA
    leaves behind: views that change nothing, and `_safe_softmax` in its parts.
    """
    graph, copy = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(gm.graph, copy)
    graph.output(tuple(pytree.tree_leaves(result)))
    for node in list(graph.nodes):
        if call_name(node) in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
        elif call_name(node) == "where":
            _restore_softmax(node)
        elif call_name(node) == "expand" and _changes_nothing(node):
            node.replace_all_uses_with(operand(node))
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if call_name(node) == "getitem" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def _changes_nothing(node: fx.Node) -> bool:
    before, after = shape_of(operand(node)), shape_of(node)
    return len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True))


def _restore_softmax(node: fx.Node) -> None:
    """`where(row is hidden, 0, softmax)` is what `_safe_softmax` decomposes to; a row that sees nothing is padding."""
    zeros, probs = node.args[1:] if len(node.args) == 3 else (None, None)
    if not isinstance(probs, fx.Node) or call_name(probs) != "softmax":
        return
    if isinstance(zeros, fx.Node) and call_name(zeros) == "full_like" and zeros.args == (probs, 0):
        node.replace_all_uses_with(probs)
        _erase_dead(node)


def _erase_dead(node: fx.Node) -> None:
    """Erase a node without users, and what fed only it."""
    above = node.all_input_nodes
    node.graph.erase_node(node)
    for other in above:
        if not other.users and other.op == "call_function":
            _erase_dead(other)


def pure(lowered: Lowered) -> fx.GraphModule:
    """The lowered graph as `(inputs that are no past.., tokens, state..) -> (outputs.., new state..)`; changes it.

    Raises:
        DeclinedError: the past has a fixed length, or layers have pasts of different lengths.
    """
    graph = lowered.gm.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    state = [node for nodes in lowered.states for node in nodes]
    pasts = dict(_pasts(inputs, lowered))
    length = _length(pasts, lowered.bindings)
    with graph.inserting_before(state[0]):
        tokens = graph.placeholder(TOKENS)
    tokens.meta = {"example_value": length}
    for past, (axes, slots) in pasts.items():
        _detach(past, axes, slots, tokens)
    after = _without_mutation(graph)
    output = next(iter(reversed(graph.nodes)))
    output.args = ((*flat_outputs(output), *(after[node] for node in state)),)
    graph.lint()
    return fx.GraphModule(lowered.gm, graph)


def _pasts(inputs: Sequence[fx.Node], lowered: Lowered) -> Iterator[tuple[fx.Node, tuple[str, fx.Node]]]:
    """Each past with its axes and the slots that hold it now, whose other sizes are the same."""
    for binding, state in zip(lowered.bindings, lowered.states, strict=True):
        assert binding.past is not None
        if any(layout.piece is not None for layout in binding.layouts):
            raise DeclinedError(
                f"the cache is {binding.layouts[0].value}: exported programs have caches of four axes",
                where=binding.where,
                hint="cache keys and values as [B, Hkv, T, D] or [B, T, Hkv, D], each in a tensor of its own",
            )
        for half, place in enumerate(binding.past):
            yield inputs[place], (binding.layouts[half].value, state[half])


def _length(pasts: dict[fx.Node, tuple[str, fx.Node]], bindings: Sequence[Binding]) -> Any:
    """The symbol of the past's length.

    Raises:
        DeclinedError: it is a number, or there are several that differ.
    """
    lengths = [shape_of(past)[axes.index("T")] for past, (axes, _) in pasts.items()]
    fixed = next((size for size in lengths if isinstance(size, int)), None)
    if fixed is not None:
        raise DeclinedError(
            f"the past has a fixed length of {fixed}: the program serves one step only",
            where=bindings[0].where,
            hint="export it with a dynamic length, dynamic_shapes={'k': {2: torch.export.Dim.DYNAMIC}, ..}",
        )
    names = {str(size) for size in lengths}
    if len(names) > 1 and not all(size.node.expr.is_Symbol for size in lengths):
        raise DeclinedError(
            f"layers have pasts of different lengths: {', '.join(sorted(names))}",
            where=bindings[0].where,
            hint="one step of a program must add the same tokens to every cache",
        )
    return lengths[0]


def _detach(past: fx.Node, axes: str, slots: fx.Node, tokens: fx.Node) -> None:
    """Answer what is still asked of a past (its sizes, for nothing reads its data) and take the input away."""
    graph = past.graph
    for user in list(past.users):
        dim = argument(user, 1, "dim") if call_name(user) in ("size", "sym_size") else None
        with graph.inserting_before(user):
            if isinstance(dim, int):
                user.replace_all_uses_with(_size(past, normal_dim(dim, 4), axes, slots, tokens))
            else:
                sizes = [_size(past, at, axes, slots, tokens) for at in range(4)]
                one = graph.call_method("new_empty", (slots, (1,)))
                user.replace_input_with(past, graph.call_method("expand", (one, *sizes)))
        if isinstance(dim, int):
            graph.erase_node(user)
    graph.erase_node(past)


def _size(past: fx.Node, at: int, axes: str, slots: fx.Node, tokens: fx.Node) -> fx.Node:
    """A size of a past, from what is left: only the tokens and the batch may change from call to call."""
    if axes[at] == "T":
        return tokens
    if axes[at] == "B":
        return past.graph.call_function(torch.ops.aten.sym_size.int, (slots, 0))
    return past.graph.call_function(int, (shape_of(past)[at],))


def _without_mutation(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Every `decode_attend` as `decode_step`; the new state by the state that it replaces."""
    after: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=decode_attend):
        with graph.inserting_before(node):
            before, state, behind = node.args[:FIRST], node.args[FIRST], node.args[FIRST + 1 :]
            step = graph.call_function(step_op(len(state)), (*before, *state, *behind), node.kwargs)
            parts = [graph.call_function(operator.getitem, (step, at)) for at in range(len(state) + 1)]
        for made in (step, *parts):
            made.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        parts[0].meta["example_value"] = example(node)
        node.replace_all_uses_with(parts[0])
        after.update(zip(state, parts[1:], strict=True))
        graph.erase_node(node)
    return after
