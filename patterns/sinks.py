"""Learned sinks, one logit for each query head, as a column of the logits or as a gate behind the softmax.

    attention * sigmoid(logsumexp(logits) - sinks)

takes the same share off every output as sinks in the softmax's denominator do: sum(e^l) / (sum(e^l) + e^sinks).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpass.patterns.logits import SAME, is_cast_of_numbers
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, changes, is_metadata, operand
from kvpass.graph.factor_steps import STEPS
from kvpass.graph.factors import Factors
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import is_one, normal_dim, same, shape_of
from kvpass.graph.views import chain_scale, walk_up
from kvpass.sites.site import Core

_ROWS = SAME | {"unsqueeze"}


def sink_logits(node: fx.Node, rank: int = 4) -> fx.Node:
    """The vector of one logit for each query head that is repeated along the other axes.

    Raises:
        Miss: the sinks differ between sequences or queries.
    """
    current, chain = walk_up(node, lambda n: len([size for size in shape_of(n) if not is_one(size)]) == 1)
    wide = [at for at, size in enumerate(shape_of(current)) if not is_one(size)]
    factors = Factors(current, STEPS)
    followed = factors.follow(current, chain) is None and len(factors.axes) == rank and chain_scale(chain) == 1.0
    heads = [tuple(f for f in axis if not is_one(f.size)) for axis in factors.axes]
    if len(wide) != 1 or not followed or heads[1] != tuple(factors.roots[wide[0]]):
        raise Miss(Reason.UNSUPPORTED_ATTENTION, node, "the sinks are not one number for each query head")
    return current


def gated(core: Core, softmax: fx.Node) -> Core:
    """The core with the gate behind it as its sinks, if there is such a gate; else as it is.

    Raises:
        Miss: the gate's sinks are not one number for each query head.
    """
    readers = [user for user in core.node.users if not is_metadata(user)]
    if core.sinks is not None or len(readers) != 1 or core.axes.out != "BHSD":
        return core
    found = _gate(readers[0], core.node, operand(softmax))
    if found is None:
        return core
    sinks, passed = found
    return replace(core, node=readers[0], sinks=sinks, inner=(*core.inner, core.node, *reversed(passed)))


def _gate(mul: fx.Node, attention: fx.Node, logits: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The sinks of a gate on an attention, and the nodes that make it, last first."""
    if call_name(mul) not in ("mul", "multiply") or not _same_shape(mul, attention):
        return None
    gate = next((node for node in mul.args if node is not attention), None)
    if not isinstance(gate, fx.Node) or len(shape_of(gate)) != 4 or not is_one(shape_of(gate)[-1]):
        return None
    sigmoid, below = _above(gate, _ROWS)
    if call_name(sigmoid) != "sigmoid":
        return None
    difference, between = _above(operand(sigmoid), SAME)
    if call_name(difference) not in ("sub", "subtract") or set(difference.kwargs) - {"input", "other"}:
        return None
    lse, casts = _above(operand(difference), SAME)
    sinks = argument(difference, 1, "other")
    if not _is_lse(lse, logits) or not isinstance(sinks, fx.Node) or not _same_shape(difference, lse):
        return None
    vector = sink_logits(sinks, len(shape_of(difference)))
    return vector, [*below, sigmoid, *between, difference, *casts, lse]


def _above(node: Any, names: frozenset[str]) -> tuple[fx.Node, list[fx.Node]]:
    """What a value is a cast of, and the casts; with "unsqueeze" in `names`, also without an axis at the end."""
    passed: list[fx.Node] = []
    while call_name(node) in names and (call_name(node) == "unsqueeze" or is_cast_of_numbers(node)):
        rank = len(shape_of(node))
        if call_name(node) == "unsqueeze" and normal_dim(argument(node, 1, "dim"), rank) != rank - 1:
            break
        passed.append(node)
        node = operand(node)
    return node, passed


def _is_lse(node: fx.Node, logits: fx.Node) -> bool:
    """`logsumexp` over the keys of the very logits that the softmax reads, [B, H, S, T]."""
    if call_name(node) != "logsumexp" or operand(node) is not logits or len(shape_of(logits)) != 4:
        return False
    if any(changes(user) for user in logits.users):
        return False
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return isinstance(dim, int) and normal_dim(dim, 4) == 3


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right, strict=True))
