"""The records of a backend's graphs, and the table that they print as."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpass.plan.plan import Plan
    from kvpass.sites.table import SiteTable

STAGES = ("capture", "scan", "plan", "lower", "verify", "inner")
"""Where the seconds of a graph go, in order; `capture` is Dynamo's own share."""


@dataclass
class GraphRecord:
    """What happened to one captured graph.

    Attributes:
        table: sites matched and declined.
        plan: what replaced each site; None if the graph was left as it is, or refused.
        frame: number of the frame that Dynamo compiled, counted over the process from 0; graphs of one call with graph
            breaks have frames of their own.
        inner: the inner compiler with its options, as text.
        seconds: spent, by stage: `scan`, `plan`, `lower`, `verify`, `inner` (the inner compiler).
    """

    table: SiteTable
    plan: Plan | None = None
    frame: int = field(default_factory=lambda: _frames_compiled())
    inner: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def title(self, number: int) -> str:
        """What is told of the graph while it is compiled."""
        phases = sorted({site.phase.value for site in self.table})
        return f"graph {number} ({' and '.join(phases)}, {len(self.table.sites)} layers)"

    @property
    def phase(self) -> str:
        """`prefill`, `extend`, `decode`, or several; else `declined` (sites with a cache, none rewritten) or
        `untouched` (no cache).
        """
        if self.plan is None or not self.table.sites:
            return "declined" if self.table else "untouched"
        return "+".join(dict.fromkeys(site.phase.value for site in self.table.sites))

    @property
    def ops(self) -> dict[str, int]:
        """How often each kvpass op stands in the rewritten graph."""
        return Counter(op for one in (self.plan.sites if self.plan is not None else ()) for op in one.ops)

    def capture_seconds(self) -> float:
        """Dynamo's own time for the frame that this graph is of; 0.0 while the frame is still being compiled."""
        frames = _frame_seconds()
        return max(0.0, frames[self.frame] - sum(self.seconds.values())) if self.frame < len(frames) else 0.0


class Graphs(list[GraphRecord]):
    """The graphs that a backend compiled, in order. `str()` and `repr()` are a table: one row a graph."""

    def __str__(self) -> str:
        if not self:
            return "no graph yet: a model is compiled when it is called"
        rows = [HEADINGS, *(_row(number, record) for number, record in enumerate(self, 1))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(_cells(row, widths)).rstrip() for row in rows)

    __repr__ = __str__


HEADINGS = ("graph", "phase", "matched", "declined", "by choice", "ops", *(f"{stage}, s" for stage in STAGES), "frame")


def _row(number: int, record: GraphRecord) -> tuple[str, ...]:
    failed = len(record.table.failed)
    counts = (len(record.table.sites), failed, len(record.table.declined) - failed, sum(record.ops.values()))
    seconds = {"capture": record.capture_seconds(), **record.seconds}
    times = (f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES)
    return (str(number), record.phase, *map(str, counts), *times, str(record.frame))


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Words to the left, numbers to the right."""
    for at, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if at == 1 else cell.rjust(width)


def capture_seconds(graphs: Sequence[GraphRecord]) -> float:
    """Dynamo's own time for tracing the frames of these graphs, the backend's share taken out."""
    frames = _frame_seconds()
    whole = sum(frames[at] for at in {record.frame for record in graphs} if at < len(frames))
    return whole - sum(sum(record.seconds.values()) for record in graphs) if whole else 0.0


def _frame_seconds() -> list[float]:
    from torch._dynamo.utils import compilation_time_metrics as metrics

    return metrics.get("_compile.compile_inner", [])


def _frames_compiled() -> int:
    return len(_frame_seconds())
