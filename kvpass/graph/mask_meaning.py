"""What a mask looks like, in words for people: causal, window, padding, bidirectional, block, bias, none, unknown.

Read off the comparisons and the arithmetic above a mask. Nothing depends on it: the tensor itself is always kept and
looked up by position. Where a node has no meaning that is known here, the word is `unknown`, beside what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import argument, call_name, changes, example, operand
from kvpass.graph.numbers import NO_WEIGHT, number
from kvpass.graph.positions import REVERSED, compared
from kvpass.graph.shapes import shape_of
from kvpass.terms import MaskKind

WORDS = ("causal", "window", "padding", "bidirectional", "block", "bias", "unknown")
LIMIT = 30
"""Operations in a row between a mask and what it is made of."""

CASTS = frozenset({"to", "bool", "float", "half", "bfloat16", "long", "int", "type", "type_as"})
VIEWS = frozenset({"expand", "reshape", "contiguous", "clone", "unsqueeze", "squeeze", "transpose", "permute"})
PARTS = frozenset({"getitem", "slice", "select", "narrow", "repeat", "repeat_interleave", "pad", "detach"})
SAME = CASTS | VIEWS | PARTS
AND = frozenset({"and_", "logical_and", "bitwise_and", "iand", "mul", "imul"})
OR = frozenset({"or_", "logical_or", "bitwise_or", "ior"})
NOT = frozenset({"invert", "logical_not", "bitwise_not"})
EMPTY = frozenset({"ones", "new_ones", "ones_like", "any", "all", "zeros", "new_zeros", "zeros_like"})
SUMS = frozenset({"add", "sub", "rsub", "arange", "cumsum", "cat"})
ARITHMETIC = SUMS | {"mul", "imul", "mul_", "neg", "abs", "truediv", "div", "pow", "log", "exp", "sqrt"}
Words = frozenset[str]
NOTHING: Words = frozenset()
UNKNOWN: Words = frozenset({"unknown"})


def mask_kind(terms: Iterable[tuple[fx.Node, MaskKind]], causal: bool) -> str:
    """Words for the parts of a mask, `causal + padding`; `none` if nothing is hidden and nothing added."""
    words = {"causal"} if causal else set()
    for node, kind in terms:
        words |= _added(node, None, 0) if kind is MaskKind.ADD else _truth(node, kind is MaskKind.KEEP, None, 0)
    return " + ".join(word for word in WORDS if word in words) or "none"


def _truth(node: Any, keep: bool, via: fx.Node | None, depth: int) -> Words:
    """Words for a tensor of truths: True is kept, or True is hidden."""
    if not isinstance(node, fx.Node) or depth > LIMIT or _changed_by_others(node, via):
        return UNKNOWN
    name = call_name(node)
    if node.op == "placeholder":
        return _given(node)
    if name in REVERSED:
        return _comparison(node, keep, depth)
    if name in AND | OR:
        return _joined(node, (name in AND) == keep, keep, depth)
    if name in NOT:
        return _truth(operand(node), not keep, node, depth + 1)
    if name in ("sub", "rsub") and 1.0 in [number(side) for side in node.args]:
        return _truth(node.all_input_nodes[0], not keep, node, depth + 1)
    if name in ("add", "iadd"):  # a mask plus [B, T] of ones and zeros is 0 where the mask lets padding through
        return frozenset[str]().union(*(_added(part, node, depth + 1) for part in node.all_input_nodes))
    if name in ("tril", "triu"):
        return _triangle(node, keep)
    if name in EMPTY or (name in ("full", "new_full") and _fill(node) is not None):
        return NOTHING
    if name == "where":
        return frozenset[str]().union(*(_truth(part, keep, node, depth + 1) for part in node.all_input_nodes))
    return _truth(operand(node), keep, node, depth + 1) if name in SAME else UNKNOWN


def _given(node: fx.Node) -> Words:
    """[B, T] from outside says which tokens are real."""
    return frozenset({"padding"}) if len(shape_of(node)) == 2 else UNKNOWN


def _joined(node: fx.Node, both: bool, keep: bool, depth: int) -> Words:
    """Parts of which both must be kept, or one of them."""
    found = [_truth(part, keep, node, depth + 1) for part in node.all_input_nodes]
    words = frozenset[str]().union(*found)
    widened = not both and "causal" in words and all(found)
    return words | {"bidirectional"} if widened else words


def _comparison(node: fx.Node, keep: bool, depth: int) -> Words:
    words = compared(node, keep)
    if words is not None:
        return words
    left, right = node.args[0], argument(node, 1, "other")
    value, name = number(right), call_name(node)
    if value is None or not isinstance(left, fx.Node):
        return UNKNOWN
    same = (name in ("gt", "ne") and 0 <= value < 1) or (name in ("eq", "ge") and value == 1)
    flipped = (name == "eq" and value == 0) or (name in ("lt", "le") and 0 <= value <= 1)
    return _truth(left, keep if same else not keep, node, depth + 1) if same or flipped else UNKNOWN


def _triangle(node: fx.Node, keep: bool) -> Words:
    """`tril` or `triu` of ones; above it is the future, far below it the distant past."""
    lower = call_name(node) in ("tril", "tril_")
    base = operand(node)
    if not isinstance(base, fx.Node) or _fill(base) is None:
        return _truth(base, keep, node, 1) | UNKNOWN
    return frozenset({"causal"}) if lower == keep else frozenset({"window"})


def _added(node: Any, via: fx.Node | None, depth: int) -> Words:
    """Words for a tensor that is added to the logits."""
    if number(node) is not None:
        return NOTHING
    if not isinstance(node, fx.Node) or depth > LIMIT:
        return UNKNOWN
    changed = [user for user in _changed_by_others(node, via) if not _too_late(user, via)]
    put = [argument(user, 2, "value") if call_name(user) == "setitem" else None for user in changed]
    if not all(isinstance(value, fx.Node) for value in put):
        return UNKNOWN
    return _made(node, via, depth).union(*(_added(value, None, depth + 1) for value in put))


def _made(node: fx.Node, via: fx.Node | None, depth: int) -> Words:
    """Of what it was when it was made."""
    name = call_name(node)
    step: Callable[[fx.Node, int], Words] | None = _ADDED.get(name)
    if step is not None:
        return step(node, depth)
    if _fill(node) is not None:
        return NOTHING
    if example(node) is not None and not example(node).dtype.is_floating_point:
        return _truth(node, True, via, depth)
    if name in SAME and call_name(operand(node)) != "arange":
        return _added(operand(node), node, depth + 1)
    if _learned(node) or name == "embedding":
        return frozenset({"bias"})
    return frozenset({"bias"}) if name in ARITHMETIC and _numeric(node) else UNKNOWN


def _filled(node: fx.Node, depth: int) -> Words:
    """`where(condition, a, b)` and `masked_fill(a, condition, b)`"""
    if call_name(node) == "where":
        condition, yes, no = node.args[0], argument(node, 1, "input"), argument(node, 2, "other")
    else:
        condition, yes, no = argument(node, 1, "mask"), argument(node, 2, "value"), operand(node)
    hidden = [(_fill(part) or 0.0) <= NO_WEIGHT for part in (yes, no)]
    if hidden[0] == hidden[1]:
        return UNKNOWN
    return _truth(condition, hidden[1], node, depth + 1) | _added(yes if hidden[1] else no, node, depth + 1)


def _scaled(node: fx.Node, depth: int) -> Words:
    """A truth times a large negative number hides; anything else is a bias."""
    left, right = node.args[0], argument(node, 1, "other")
    value, other = (_fill(right), left) if _fill(right) is not None else (_fill(left), right)
    if value is not None and value <= NO_WEIGHT:
        return _truth(other, False, node, depth + 1)
    if value is not None:
        return _added(other, node, depth + 1)
    factor = example(right) if isinstance(right, fx.Node) else None
    if isinstance(factor, torch.Tensor) and factor.dtype == torch.bool:
        return _added(left, node, depth + 1) | _truth(right, False, node, depth + 1)
    return frozenset({"bias"}) if _numeric(node) else UNKNOWN


def _summed(node: fx.Node, depth: int) -> Words:
    if _numeric(node):
        return frozenset({"bias"})
    return frozenset[str]().union(*(_added(part, node, depth + 1) for part in node.args[:2]))


def _hidden_triangle(node: fx.Node, depth: int) -> Words:
    """`triu(full(.., -inf), 1)`"""
    fill = _fill(operand(node))
    return _triangle(node, fill > NO_WEIGHT) if fill is not None else UNKNOWN


_ADDED: dict[str, Callable[[fx.Node, int], Words]] = {
    **dict.fromkeys(("where", "masked_fill", "masked_fill_"), _filled),
    **dict.fromkeys(("mul", "imul", "mul_"), _scaled),
    **dict.fromkeys(("add", "iadd", "add_", "sub"), _summed),
    **dict.fromkeys(("triu", "tril", "triu_", "tril_"), _hidden_triangle),
}


def _fill(node: Any) -> float | None:
    """The number that all of a tensor is."""
    found = number(node)
    if found is not None or not isinstance(node, fx.Node):
        return found
    name = call_name(node)
    if name in ("full", "full_like"):
        return number(argument(node, 1, "fill_value"))
    if name == "new_full":
        return number(argument(node, 2, "fill_value"))
    if name in ("ones", "new_ones", "ones_like"):
        return 1.0
    if name in ("zeros", "new_zeros", "zeros_like"):
        return 0.0
    return _fill(operand(node)) if name in ("to", "expand", "bool", "float") else None


def _learned(node: fx.Node) -> bool:
    return isinstance(example(node), torch.nn.Parameter) or node.op == "get_attr"


def _numeric(node: fx.Node) -> bool:
    """Arithmetic on positions, constants and parameters alone."""
    queue, seen = [node], {node}
    for current in queue:
        leaf = _learned(current) or (current.op == "placeholder" and len(shape_of(current)) in (0, 1, 2))
        if not leaf and call_name(current) not in ARITHMETIC | SAME | {"full", "tensor", "embedding"} | EMPTY:
            return False
        fresh = [n for n in current.all_input_nodes if n not in seen] if not leaf else []
        seen.update(fresh)
        queue += fresh
        if len(queue) > 100:
            return False
    return True


def _changed_by_others(node: fx.Node, via: fx.Node | None) -> list[fx.Node]:
    return [user for user in node.users if changes(user) and operand(user) is node and user is not via]


def _too_late(change: fx.Node, via: fx.Node | None) -> bool:
    """`mask[a] = mask[a].masked_fill(..)`: what `via` read was used before the change."""
    return via is not None and all(user < change for user in via.users)
