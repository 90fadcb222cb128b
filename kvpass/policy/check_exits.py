"""What makes it impossible to merge what is evicted."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.kernels.codecs.registry import DENSE
from kvpass.kernels.rank.criterion import SCORES
from kvpass.policy.evicted import Merge
from kvpass.policy.spec import Spec


def exits(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """Whether a rule is broken, the field, and the fix."""
    merge = p.evicted.merge
    if merge is None:
        return
    yield from _words(merge)
    yield from _others(p, merge)


def _words(merge: Merge) -> Iterator[tuple[bool, str, str]]:
    """Of the words among each other."""
    yield not -1 <= merge.threshold <= 1, "evicted.merge.threshold", "give a cosine from -1 (all) to 1"
    yield merge.count < 1, "evicted.merge.count", "give a number of slots, 1 or more"
    yield not 0 < merge.sigma < float("inf"), "evicted.merge.sigma", "give a distance above 0, e.g. 5.0"
    run, one = merge.into == "run", merge.into == "one_slot"
    yield run and merge.threshold <= -1, "evicted.merge.threshold", "say when neighbours are alike, e.g. 0.75"
    fix = "one slot that goes in a step is no run: set evicted.merge.at: calls"
    yield run and merge.at != "calls", "evicted.merge.at", fix
    plain = Merge("one_slot", merge.halves, "even", count=merge.count, sigma=merge.sigma) == merge
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
