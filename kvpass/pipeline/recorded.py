"""A decode graph in the form that a device records and replays, for `mode="reduce-overhead"`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpass.graph.calls import example
from kvpass.pipeline.inner import compile_inner
from kvpass.terms import Phase

if TYPE_CHECKING:
    from kvpass.lowering.lower import Lowered
    from kvpass.pipeline.graphs import GraphRecord
    from kvpass.pipeline.inner_options import Inner
    from kvpass.plan.plan import Plan
    from kvpass.runtime.captured import Captured
    from kvpass.runtime.recordings import Recordings

log = logging.getLogger(__name__)


def recorded(
    lowered: Lowered,
    planned: Plan,
    record: GraphRecord,
    inner: Inner,
    title: str,
    recordings: list[Recordings],
    looked_into: bool,
    real: Sequence[Any] = (),
) -> Captured | str:
    """The graph in that form; or why its steps are launched, "" for no step.

    Args:
        recordings: those of the backend, none before its first graph of this kind.
        looked_into: `verify=True`.
        real: inputs of the call that the graph was captured in.
    """
    from kvpass.lowering.static import static
    from kvpass.runtime.captured import Captured
    from kvpass.runtime.graph_device import DEVICES
    from kvpass.runtime.recordings import Recordings

    if lowered.bindings[0].phase is not Phase.DECODE:
        return ""
    kind = lowered.bindings[0].device.type
    if kind not in DEVICES:
        return f"a {kind} records no graphs"
    if planned.part is not None:
        return "ranks exchange something in each step"
    if looked_into:
        return "verify=True looks into the first call of each graph"
    with record.timed("lower"):
        found = static(lowered, planned)
    if isinstance(found, str):
        log.info("%s is not static: %s", title, found)
        return found
    inputs = [example(n) for n in found.gm.graph.nodes if n.op == "placeholder"]
    with record.timed("inner"):
        run = compile_inner(inner, found.gm, inputs, title, real)
    if not recordings:
        recordings.append(Recordings(DEVICES[kind]))
    return Captured(run, lowered.gm.forward, found.feeds, recordings[0])
