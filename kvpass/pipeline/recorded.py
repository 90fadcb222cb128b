"""A decode graph in the form that a device records and replays, for `mode="reduce-overhead"`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvpass.graph.calls import example
from kvpass.pipeline.inner import compile_inner
from kvpass.terms import Phase

if TYPE_CHECKING:
    from kvpass.lowering.lower import Lowered
    from kvpass.pipeline.graphs import GraphRecord
    from kvpass.plan.plan import Plan
    from kvpass.runtime.captured import Captured

log = logging.getLogger(__name__)


def recorded(
    backend: Any, lowered: Lowered, planned: Plan, record: GraphRecord, inner: str, title: str
) -> Captured | str:
    """The graph in that form; or why its steps are launched, "" if nobody asked."""
    from kvpass.lowering.static import static
    from kvpass.runtime.captured import Captured
    from kvpass.runtime.graph_device import DEVICES
    from kvpass.runtime.recordings import Recordings

    if backend.mode == "default" or lowered.bindings[0].phase is not Phase.DECODE:
        return ""
    kind = lowered.bindings[0].device.type
    if kind not in DEVICES:
        return f"a {kind} records no graphs"
    if backend.verify:
        return "verify=True looks into the first call of each graph"
    with record.timed("lower"):
        found = static(lowered, planned)
    if isinstance(found, str):
        log.info("graph %d is not static: %s", len(backend.graphs), found)
        return found
    inputs = [example(n) for n in found.gm.graph.nodes if n.op == "placeholder"]
    with record.timed("inner"):
        run = compile_inner(inner, found.gm, inputs, title)
    if not backend.recordings:
        backend.recordings.append(Recordings(DEVICES[kind]))
    return Captured(run, lowered.gm.forward, found.feeds, backend.recordings[0])
