"""Masks from a sparse indexer (DeepSeek-V3.2): a choice of tokens, made anew for each query.

A token that its own query may not see is taken for padding and never gets a slot. A choice may leave a token out for
now and take it later, so its part of a mask becomes a low number that is added: the token is there, with probability 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import argument, call_name, example, operand
from kvpass.graph.indexer import CHOICES
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import nearby
from kvpass.graph.numbers import NO_WEIGHT, number
from kvpass.graph.views import walk_up
from kvpass.sites.site import Term
from kvpass.terms import MaskKind

FILLED = frozenset({"ones", "zeros", "ones_like", "zeros_like", "new_ones", "new_zeros"})


def split_choices(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The same mask, with choices of tokens in terms of their own.

    Raises:
        Miss: MASK_UNKNOWN, if a choice is part of a mask in a form that is not known.
    """
    return tuple(part for term in terms for part in (_split(term) if _is_chosen(term.node) else (term,)))


def _split(term: Term) -> tuple[Term, ...]:
    node = term.node
    base, chosen = _parts(node, term)
    rest = () if base is None else (replace(term, node=base),)
    half = any(example(part.node).dtype == torch.float16 for part in rest)
    if chosen is None or not _only_a_choice(chosen) or half or (base is not None and _is_chosen(base)):
        raise Miss(Reason.MASK_UNKNOWN, node, "a choice of tokens (topk, sort) is mixed into the mask")
    return *rest, replace(term, node=chosen, kind=MaskKind.ADD, factor=NO_WEIGHT)


def _parts(node: fx.Node, term: Term) -> tuple[fx.Node | None, fx.Node | None]:
    """A mask without the choice in it, if there is more; and where the choice hides keys."""
    if term.kind is MaskKind.HIDE:
        return None, node
    if term.kind is MaskKind.ADD:
        fill = number(argument(node, 2, "value")) if call_name(node) == "masked_fill" else None
        hides = fill is not None and fill * term.factor <= NO_WEIGHT
        return (operand(node), argument(node, 1, "mask")) if hides else (None, None)
    if call_name(node) not in ("and_", "bitwise_and", "logical_and"):
        return None, _inverted(node)
    sides = operand(node), argument(node, 1, "other")
    found = [(base, _inverted(side)) for base, side in (sides, sides[::-1]) if _is_chosen(side)]
    return found[0] if len(found) == 1 else (None, None)


def _inverted(node: Any) -> fx.Node | None:
    inverts = isinstance(node, fx.Node) and call_name(node) in ("invert", "bitwise_not", "logical_not")
    return operand(node) if inverts else None


def _only_a_choice(node: fx.Node) -> bool:
    """Is a mask the same everywhere but at the chosen places?"""
    top, _ = walk_up(node, lambda n: False)
    return call_name(top) in ("scatter", "scatter_") and call_name(operand(top)) in FILLED


def _is_chosen(node: Any) -> bool:
    """Does a mask come from a topk or a sort, this side of projections?"""
    if not isinstance(node, fx.Node):
        return False
    return any(call_name(above) in CHOICES for above in nearby(node, lambda n: n.all_input_nodes))
