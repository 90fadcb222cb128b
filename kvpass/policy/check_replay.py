"""What makes it impossible to wait for a replay."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.policy.spec import Spec

SCORE = "replay"
"""The scorer whose scores a replay gives."""


def replaying(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """Whether a rule is broken, the field, and the fix."""
    asked = p.observe.replay != "none"
    yield asked and p.score != SCORE, "score", "a replay gives one score: set score: replay"
    yield not asked and p.score == SCORE, "observe.replay", "score: replay is what a replay gives: set it to repeat"
    if not asked:
        return
    chunk = p.options.get("chunk", 1)
    yield not isinstance(chunk, int) or chunk < 1, "options.chunk", "give a number of tokens, e.g. 2000"
    kinds = p.allocate.layers in ("uniform", "flat") and p.allocate.heads in ("uniform", "flat")
    fix = "slots are shared out by scores: {}: uniform or flat"
    yield p.allocate.layers not in ("uniform", "flat"), "allocate.layers", fix.format("allocate.layers")
    yield not kinds, "allocate.heads", fix.format("allocate.heads")
    yield p.observe.heads != "each", "observe.heads", "a replay scores each head by itself: leave it out"
    yield p.evicted.merge is not None, "evicted", "a replay decides what is dropped: set evicted: drop"
    yield p.evicted.refit is not None, "evicted", "a replay decides what is dropped: set evicted: drop"
    yield p.evicted.to is not None, "evicted", "a replay decides what is dropped: set evicted: drop"
    fix = "keys are turned at the end of a call, before its replay: set positions: kept"
    yield p.positions == "reindexed", "positions", fix
    yield p.protect.tokens or p.fair, "protect.tokens", "marks are of a call's own tokens: leave protect.tokens out"
    yield p.every > 1, "every", "slots are shared out at the end of calls: set when: calls"
    yield p.when == "first", "when", "each call's tokens are replayed: set when: calls"
