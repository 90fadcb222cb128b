"""What makes it impossible to merge what is evicted, or to fit others to it."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.kernels.codecs.registry import DENSE
from kvpass.kernels.rank.criterion import SCORES
from kvpass.policy.evicted import Merge, Refit
from kvpass.policy.spec import Spec

MOST_BIAS = 20.0
"""A factor of e^20 is more than any slot stands for."""


def exits(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """Whether a rule is broken, the field, and the fix."""
    merge, refit = p.evicted.merge, p.evicted.refit
    both = "what is merged already cannot be stood for once more: set evicted.merge: null, or evicted.refit: null"
    yield merge is not None and refit is not None, "evicted", both
    fix = "what is demoted stays, and nothing need stand for it: leave evicted.to or evicted.refit out"
    yield refit is not None and p.evicted.to is not None, "evicted", fix
    if merge is not None:
        yield from _words(merge)
        yield from _others(p, merge)
    if refit is not None:
        yield from _fits(p, refit)


def _words(merge: Merge) -> Iterator[tuple[bool, str, str]]:
    """Of the words among each other."""
    yield not -1 <= merge.threshold <= 1, "evicted.merge.threshold", "give a cosine from -1 (all) to 1"
    yield merge.count < 1, "evicted.merge.count", "give a number of slots, 1 or more"
    yield not 0 < merge.sigma < float("inf"), "evicted.merge.sigma", "give a distance above 0, e.g. 5.0"
    run, one = merge.into == "run", merge.into == "one_slot"
    yield run and merge.threshold <= -1, "evicted.merge.threshold", "say when neighbours are alike, e.g. 0.75"
    fix = "one slot that goes in a step is no run: set evicted.merge.at: calls"
    yield run and merge.at != "calls", "evicted.merge.at", fix
    fix = "only one_slot counts what is in it: set into: one_slot, or bias: none"
    yield merge.bias == "count" and not one, "evicted.merge.bias", fix
    plain = Merge("one_slot", merge.halves, "even", count=merge.count, sigma=merge.sigma, bias=merge.bias) == merge
    fix = "one_slot holds the mean of all that went: set weight: even, and leave mean, gate, threshold and at out"
    yield one and not plain, "evicted.merge.into", fix
    moving = merge.gate == "moving"
    fix = "a moving bar is of the largest cosines: set evicted.merge.into: nearest_key"
    yield moving and merge.into != "nearest_key", "evicted.merge.gate", fix
    fix = "a moving bar is the only one: leave threshold out, or set gate: none"
    yield moving and merge.threshold > -1, "evicted.merge.threshold", fix
    fix = "chance compares with the slots that what goes is merged into: a run has one pivot, set gate: none"
    yield run and merge.gate != "none", "evicted.merge.gate", fix


def _others(p: Spec, merge: Merge) -> Iterator[tuple[bool, str, str]]:
    """With what else the policy says."""
    attended = p.score in SCORES and "sum" in p.statistic.keep
    fix = "chance is by attention so far: add 'sum' to statistic.keep, of a score that is no scorer's"
    yield merge.gate == "chance" and not attended, "evicted.merge.gate", fix
    shared = p.allocate.heads != "uniform" or p.allocate.layers in ("flat", "preference")
    fix = "a moving bar is one for all heads, which lose equally many slots then: leave allocate out, or set gate: none"
    yield merge.gate == "moving" and shared, "evicted.merge.gate", fix
    yield p.allocate.rings > 0, "evicted", "rings drop what loses a duel: leave allocate.rings out"
    stored = (p.store.k, p.store.v) != (DENSE, DENSE)
    yield stored, "evicted", "codes cannot be added up: set store: dense, or evicted: drop"
    turned = merge.halves == "both" and p.positions == "reindexed"
    fix = "a merged key stands at no place that it could be turned from: set halves: values, or positions: kept"
    yield turned, "evicted.merge.halves", fix


def _fits(p: Spec, refit: Refit) -> Iterator[tuple[bool, str, str]]:
    """Of a fit, and with what else the policy says."""
    yield refit.queries < 1, "evicted.refit.queries", "give a number of queries, 1 or more, e.g. 256"
    low, high = refit.bias
    around = -MOST_BIAS <= low <= 0 <= high <= MOST_BIAS
    yield not around, "evicted.refit.bias", "give bounds around 0, e.g. [-3.0, 3.0]"
    yield not 0 <= refit.iters <= 1000, "evicted.refit.iters", "give a number of steps from 0 to 1000"
    yield not 0 <= refit.ridge < float("inf"), "evicted.refit.ridge", "give a number >= 0, e.g. 1.0e-3"
    shared = p.allocate.layers in ("flat", "preference") or p.allocate.heads == "threshold"
    fix = "slots that only data share out are chosen after the call, without its queries: set allocate.heads: flat"
    yield shared, "evicted", fix
    yield p.allocate.rings > 0, "evicted", "rings drop what loses a duel: leave allocate.rings out"
    stored = (p.store.k, p.store.v) != (DENSE, DENSE)
    yield stored, "evicted", "codes cannot be fitted: set store: dense, or evicted: drop"
    fix = "slots are fitted to queries at their distances: set positions: kept"
    yield p.positions == "reindexed", "positions", fix
