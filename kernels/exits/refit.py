"""Attention Matching: slots that stay are fitted to stand for those that go too (arXiv 2602.16284, the fast variant
AM-HighestAttnKeys; adamzweiger/compaction).

Of one head and some reference queries: a bias per slot, by which those that stay have the mass of all, then values, by
which they give the output of all. Both are least squares over the queries; of all solutions that fit equally well we
want the nearest to what was there, so that fewer queries than slots, or equal keys, change no more than they must.
Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.bias import BIAS_FIELD
from kvpass.kernels.slots.state import Field
from torch import Tensor

LEAST = 1e-8
"""Ridge below which a singular matrix would fail, as a share of the mean square of its columns."""

TINY = 1e-200
"""Below every square that matters."""

POWER_STEPS = 3
"""Of the estimate of a matrix' norm."""


@dataclass(frozen=True)
class Refit(Record):
    """Slots that stay are fitted to stand for those that go, at the end of calls of several tokens.

    Attributes:
        refit_queries: the last so many of the call's own queries, of all query heads of the group, are fitted to; 0:
            nothing is.
        refit_low, refit_high: bounds of a slot's bias.
        refit_iters: projected-gradient steps after the bounds were put on.
        refit_ridge: how much a change of a bias' factor, or of a value, costs, as a share of the mean square of the
            columns that it is fitted with.
        refit_values: whether values are fitted too.
    """

    refit_queries: int = 0
    refit_low: float = -3.0
    refit_high: float = 3.0
    refit_iters: int = 2
    refit_ridge: float = 0.0
    refit_values: bool = True

    def work(self, rule: Rule) -> Iterator[str]:
        if self.refit_queries:
            yield f"{self.refit_queries}*T"
            yield "n*n*n fits"

    @property
    def slot_bytes(self) -> int:
        return 4 if self.refit_queries else 0

    @property
    def state_fields(self) -> tuple[Field, ...]:
        return (BIAS_FIELD,) if self.refit_queries else ()


def refitted(
    logits: Tensor, values: Tensor, chosen: Tensor, bias: Tensor, refit: Refit
) -> tuple[Tensor, Tensor] | None:
    """What the slots that stay of one head get: biases float32 [t], and values float32 [t, Dv]; None if no query says
    anything of them.

    logits: float32 [n, T], of the reference queries with the span of keys of which some stay, -inf where hidden, biases
    that slots have included; values [T, Dv]; chosen: int64 [t], which stay; bias: float32 [t], theirs so far.
    """
    logits = logits[(logits[:, chosen] > -torch.inf).any(-1)].double()
    mass = (logits - logits.amax(-1, keepdim=True)).exp()
    mass = mass[mass[:, chosen].sum(-1) > 0]
    if not len(mass):
        return None
    total, part = mass.sum(-1, keepdim=True), mass[:, chosen]
    old = bias.double()
    bounds = (refit.refit_low - old).exp(), (refit.refit_high - old).exp()
    factor = matched(part, total, bounds, refit.refit_iters, refit.refit_ridge)
    after, held = old + factor.log()[:, 0], values[chosen].double()
    if refit.refit_values:
        weighed = part * factor.mT
        shares = weighed / weighed.sum(-1, keepdim=True)
        held = nearest_solution(shares, mass / total @ values.double(), held, refit.refit_ridge)
    return after.float(), held.float()


def matched(part: Tensor, total: Tensor, bounds: tuple[Tensor, Tensor], iters: int, ridge: float) -> Tensor:
    """Factors [t, 1] within bounds [t] each, by which masses `part` [n, t] add up to `total` [n, 1]: least squares, put
    into the bounds, then steps down the gradient that stay there.
    """
    low, high = (bound[:, None] for bound in bounds)
    factor = nearest_solution(part, total, torch.ones_like(low), ridge).clamp(low, high)
    steepest = _norm(part).clamp(min=TINY)
    for _ in range(iters):
        factor = (factor - part.mT @ (part @ factor - total) / steepest).clamp(low, high)
    return factor


def _norm(matrix: Tensor) -> Tensor:
    """The largest singular value squared, by power steps from an even start; entries are no less than 0."""
    along = matrix.new_ones(matrix.shape[1], 1)
    for _ in range(POWER_STEPS):
        along = matrix.mT @ (matrix @ along)
        along = along / torch.linalg.vector_norm(along).clamp(min=TINY)
    found: Tensor = (matrix @ along).square().sum()
    return found


def nearest_solution(matrix: Tensor, wanted: Tensor, start: Tensor, ridge: float) -> Tensor:
    """x [t, m] that makes matrix [n, t] times x nearest to wanted [n, m] and, where that leaves it open, is nearest to
    start [t, m]; a ridge above 0 holds it there. By Cholesky's factors of the smaller side.
    """
    count, width = matrix.shape
    wide = width > count
    square = matrix @ matrix.mT if wide else matrix.mT @ matrix
    cost = max(ridge, LEAST) * matrix.square().sum() / width
    square.diagonal().add_(torch.where(cost > 0, cost, 1.0))
    off, factor = wanted - matrix @ start, torch.linalg.cholesky(square)
    if wide:
        return start + matrix.mT @ torch.cholesky_solve(off, factor)
    return start + torch.cholesky_solve(matrix.mT @ off, factor)
