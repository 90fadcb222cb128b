"""Where a graph repeats itself: layers are alike, so code compiled for one of them serves them all.

The graph is cut where little is alive, at the residual stream. Pieces of equal form (region_form.py) are one kind;
neighbours that nearly always come together are joined, so that a layer is one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.lowering.written import memory_of, written_by
from kvpass.pipeline.region_form import SCALARS, Form, form_of, is_constant

SMALLEST = 12
"""Nodes in a piece that is worth a call of its own (some 30 us)."""

WORTH = 0.5
"""Part of the graph's nodes that need not be compiled, from which on it is cut."""

LONG = 0.3
"""Values that live through this part of the graph are everyone's, like cosines and masks, and stop no cut."""

_NEVER = 1 << 20
_CONTEXTS = ("_set_grad_enabled", "_enter_", "_exit_", "_set_", "_saved_tensors_hooks", "_functorch")


@dataclass(frozen=True)
class Region:
    """A piece of a graph; those of equal `kind` are equal in form."""

    form: Form
    kind: int


def regions(gm: fx.GraphModule) -> list[Region] | None:
    """Pieces whose sequence is the graph, or None if it repeats too little to be worth it."""
    body, dead = _body(gm.graph)
    cuts = _cuts(body)
    if len(cuts) < 2:
        return None
    pieces = _Pieces(body, cuts, _size_inputs(gm.graph), dead)
    pieces.join_companions()
    pieces.join_singles()
    kinds = [piece.key for piece in pieces.forms]
    saved = sum(len(one.nodes) for at, one in enumerate(pieces.forms) if one.key in kinds[:at])
    if saved < WORTH * len(body) or any("untold" in map(_head, key[1]) for key in kinds):
        return None
    numbers = {key: at for at, key in enumerate(dict.fromkeys(kinds))}
    return [Region(one, numbers[one.key]) for one in pieces.forms]


class _Pieces:
    """Consecutive pieces of the graph and their forms."""

    def __init__(
        self, body: Sequence[fx.Node], cuts: Sequence[int], sizes: dict[Any, fx.Node], dead: set[fx.Node]
    ) -> None:
        self.sizes, self.dead = sizes, dead
        self.forms = [self._form(body[start:end]) for start, end in pairwise([0, *cuts, len(body)])]

    def _form(self, nodes: Sequence[fx.Node]) -> Form:
        return form_of(nodes, self.sizes, self.dead)

    def join_companions(self) -> None:
        """Join two kinds wherever the one is followed by the other, if that is nearly always so."""
        while True:
            names = {key: at for at, key in enumerate(dict.fromkeys(form.key for form in self.forms))}
            kinds = [names[form.key] for form in self.forms]
            count, pairs = Counter(kinds), Counter(pairwise(kinds))
            close = (p for p, n in pairs.items() if p[0] != p[1] and 2 <= n >= 0.75 * max(count[p[0]], count[p[1]]))
            best = max(close, key=pairs.__getitem__, default=None)
            if best is None:
                return
            self._join([pair == best for pair in pairwise(kinds)])

    def join_singles(self) -> None:
        """Join neighbours that are the only ones of their kind, or too small."""
        count = Counter(form.key for form in self.forms)
        alone = [count[form.key] == 1 or len(form.nodes) < SMALLEST for form in self.forms]
        self._join([a and b for a, b in pairwise(alone)])

    def _join(self, with_next: Sequence[bool]) -> None:
        groups: list[list[Form]] = [[self.forms[0]]]
        for form, joined in zip(self.forms[1:], with_next, strict=True):
            if joined:
                groups[-1].append(form)
            else:
                groups.append([form])
        self.forms = [g[0] if len(g) == 1 else self._form([n for one in g for n in one.nodes]) for g in groups]


def _body(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """Nodes that compute, in order, and sizes that nobody reads."""
    kept: list[fx.Node] = []
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        if (is_constant(node) or isinstance(example(node), SCALARS)) and node.users.keys() <= dead:
            dead.add(node)
        else:
            kept.append(node)
    return kept[::-1], dead


def _size_inputs(graph: fx.Graph) -> dict[Any, fx.Node]:
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(example(n), torch.SymInt)]
    return {example(node).node.expr: node for node in inputs}


def _cuts(body: Sequence[fx.Node]) -> list[int]:
    """Places before which the graph may be cut: where as little is alive as anywhere in its middle half."""
    order = {node: at for at, node in enumerate(body)}
    steps = [0] * (len(body) + 1)
    for start, end, weight in (*_lives(body, order), *_changes(body, order), *_contexts(body)):
        steps[start + 1] += weight
        steps[end + 1] -= weight
    alive = list(accumulate(steps))
    quarter = len(body) // 4
    least = min(alive[quarter : len(body) - quarter], default=_NEVER)
    return [] if least >= _NEVER else [at for at in range(1, len(body)) if alive[at] <= least]


def _lives(body: Sequence[fx.Node], order: dict[fx.Node, int]) -> Iterator[tuple[int, int, int]]:
    """(from, to, weight) of each value; what is no tensor or number must not leave its piece."""
    for at, node in enumerate(body):
        end = max((order[user] for user in node.users if user in order), default=at)
        if is_constant(node) or isinstance(example(node), SCALARS):
            continue
        if not isinstance(example(node), torch.Tensor):
            yield at, end, _NEVER
        elif end - at <= LONG * len(body):
            yield at, end, 1


def _changes(body: Sequence[fx.Node], order: dict[fx.Node, int]) -> Iterator[tuple[int, int, int]]:
    """All that reads or makes memory that the graph changes in place, other than its inputs', stays in one piece."""
    changed = {memory_of(value) for node in body for value in written_by(node)} - {None}
    lives: dict[Any, list[int]] = {}
    for at, node in enumerate(body):
        if memory_of(node) in changed:
            lives.setdefault(memory_of(node), []).extend([at, *(order[user] for user in node.users if user in order)])
    return ((min(places), max(places), _NEVER) for places in lives.values())


def _contexts(body: Sequence[fx.Node]) -> Iterator[tuple[int, int, int]]:
    """Autocast, grad mode and the like: nothing is cut before the last change of it."""
    places = [at for at, n in enumerate(body) if getattr(n.target, "__name__", "").startswith(_CONTEXTS)]
    return iter([(0, places[-1], _NEVER)] if places else [])


def _head(signature: Any) -> Any:
    return signature[0] if isinstance(signature, tuple) else None
