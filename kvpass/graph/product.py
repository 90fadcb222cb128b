"""Matrix products in one form, however they are spelled: operands and result by axis letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from kvpass.graph.calls import argument, call_name
from kvpass.graph.numbers import number
from kvpass.graph.shapes import shape_of

SPACES = {3: "NST", 4: "BHST", 5: "BHGST"}
"""Axes of logits by their number: sequences and heads in one axis, apart, or with the group apart too."""


@dataclass(frozen=True)
class Product:
    """`alpha * left @ right + beta * added`.

    Attributes:
        left, right: operands; `added` only for baddbmm.
        axes: of left, right and result, by letters of `kvpass.sites.site.Axes`.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    axes: tuple[str, str, str]
    alpha: float = 1.0
    added: fx.Node | None = None
    beta: float = 1.0


def logits_product(node: Any) -> Product | None:
    """`q k^T`: rows are queries `S`, columns keys `T`, summed over `D`."""
    return _einsum_logits(node) if call_name(node) == "einsum" else _matmul(node, "SDT")


def values_product(node: Any, space: str) -> Product | None:
    """`p v` with probabilities of axes `space` on the left; summed over `T`."""
    if call_name(node) == "einsum":
        return _einsum_values(node, space)
    found = _matmul(node, "STD")
    return found if found is not None and found.axes[0] == space else None


def _matmul(node: Any, letters: str) -> Product | None:
    name = call_name(node) if isinstance(node, fx.Node) else ""
    rank = len(shape_of(node)) if isinstance(node, fx.Node) else 0
    if name not in ("matmul", "bmm", "baddbmm") or rank not in SPACES:
        return None
    row, inner, col = list(letters)
    batch = SPACES[rank].removesuffix("ST")
    axes = (batch + row + inner, batch + inner + col, batch + row + col)
    if name == "baddbmm":
        return _baddbmm(node, axes)
    other = "other" if name == "matmul" else "mat2"
    left, right = argument(node, 0, "input"), argument(node, 1, other)
    if any(len(shape_of(side)) != rank for side in (left, right)):
        return None
    return Product(node, left, right, axes)


def _baddbmm(node: fx.Node, axes: tuple[str, str, str]) -> Product | None:
    alpha, beta = (number(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    if alpha is None or beta is None:
        return None
    added, left, right = (argument(node, at, name) for at, name in enumerate(("input", "batch1", "batch2")))
    return Product(node, left, right, axes, alpha, added if beta else None, beta)


def _einsum(node: fx.Node) -> tuple[str, str, str, fx.Node, fx.Node] | None:
    """Letters of left, right and result, and the operands, of an einsum of two tensors."""
    equation = node.args[0]
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if any(len(set(part)) != len(part) for part in (left, right, out)):
        return None
    return left, right, out, operands[0], operands[1]  # type: ignore[return-value]  # tensors, so nodes


_KINDS = {(2, 1): "BHS", (2, 2): "BHGS", (1, 2): "BHS"}
"""What keys share with queries, and what queries have of their own: heads, heads and groups of them, or one KV head."""


def _einsum_logits(node: fx.Node) -> Product | None:
    parts = _einsum(node)
    if parts is None:
        return None
    q, k, out = parts[:3]
    shared = [x for x in out if x in q and x in k]
    queries = [x for x in out if x in q and x not in k]
    keys = [x for x in out if x in k and x not in q]
    summed = [x for x in q if x in k and x not in out]
    if (len(keys), len(summed)) != (1, 1) or out[-1] != keys[0] or (len(shared), len(queries)) not in _KINDS:
        return None
    kind = _KINDS[len(shared), len(queries)]
    names = dict(zip([*shared, *queries], kind, strict=True)) | {keys[0]: "T", summed[0]: "D"}
    return _named(node, parts, names)


def _einsum_values(node: fx.Node, space: str) -> Product | None:
    parts = _einsum(node)
    if parts is None or len(parts[0]) != len(space):
        return None
    p, v, out = parts[:3]
    names = dict(zip(p, space, strict=True))
    fresh = [x for x in v if x not in names]
    key = p[space.index("T")]
    if len(fresh) != 1 or fresh[0] not in out or key in out or key not in v or set(out) != (set(p) - {key}) | {*fresh}:
        return None
    return _named(node, parts, {**names, fresh[0]: "D"})


def _named(node: fx.Node, parts: tuple[str, str, str, fx.Node, fx.Node], names: dict[str, str]) -> Product | None:
    if any(x not in names for part in parts[:3] for x in part):
        return None
    left, right, out = ("".join(names[x] for x in part) for part in parts[:3])
    return Product(node, parts[3], parts[4], (left, right, out))
