"""What makes it impossible to demote what would be evicted to codes."""

from __future__ import annotations

from collections.abc import Iterator

from kvpass.kernels.codecs.registry import CODECS, DENSE
from kvpass.policy.check_store import named
from kvpass.policy.spec import Spec, Store


def demoting(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """Whether a rule is broken, the field, and the fix."""
    to = p.evicted.to
    if to is None:
        return
    yield from named(to, "evicted.to")
    yield to.k == to.v == DENSE, "evicted.to", f"name a codec, one of {', '.join(CODECS)}"
    fix = "what goes is merged or demoted: leave one of both out"
    yield p.evicted.merge is not None, "evicted", fix
    fix = "a slot has one code, that of evicted.to: leave store.k and store.v out"
    yield (p.store.k, p.store.v) != (DENSE, DENSE), "store", fix
    plain = Store()
    fix = "the budget says what is whole: use protect.recent and protect.sinks, and leave store.{} out"
    yield p.store.residual != plain.residual, "store.residual", fix.format("residual")
    yield p.store.sinks != plain.sinks, "store.sinks", fix.format("sinks")
    yield from _others(p)
    fix = "keys that are held as codes cannot be turned to new positions: set positions: kept, or evicted.to.k: dense"
    yield to.k != DENSE and p.positions == "reindexed", "positions", fix


def _others(p: Spec) -> Iterator[tuple[bool, str, str]]:
    """What else shares slots out, or waits."""
    shared = p.allocate.heads != "uniform" or p.allocate.layers in ("flat", "preference")
    fix = "heads that demote hold equally many tokens whole: leave {} out, or set evicted: drop"
    yield shared, "allocate", fix.format("allocate")
    yield p.allocate.rings > 0, "allocate.rings", fix.format("allocate.rings")
    fix = "shares of the budget are drawn among slots that go: leave {} out, or set evicted: drop"
    yield p.sample > 0, "sample", fix.format("sample")
    yield p.fair, "fair", fix.format("fair")
    fix = "tokens are demoted at the end of each call: leave {} out, or set evicted: drop"
    yield p.every > 1, "every", fix.format("every")
    yield p.when != "always", "when", fix.format("when")
