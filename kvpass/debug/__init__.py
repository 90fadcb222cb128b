"""Debug mode: where a report goes, and the context that writes it around the inner compilation.

Owns the reading of kvpass' environment variables, KVPASS_DEBUG and KVPASS_PROGRESS. Importing this costs nothing: the
writers (`report`, `source`, `neighbourhood`, `drawing`, `page`) are imported when a report is written, matplotlib only
for the drawings.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def debug_folder(debug: bool | str | os.PathLike[str] | None) -> str | None:
    """Folder of the debug report: as given, `kvpass_debug` for True, else what KVPASS_DEBUG says (a folder, or 1)."""
    if debug is None:
        debug = os.environ.get("KVPASS_DEBUG") or False
    if debug in (False, "0", ""):
        return None
    return "kvpass_debug" if debug in (True, "1") else str(debug)


def progress_wanted() -> bool:
    """False if KVPASS_PROGRESS says 0: then nothing is said of what takes long."""
    return os.environ.get("KVPASS_PROGRESS", "1") not in ("0", "")


def stages(folder: str | None, number: int, captured: Any, record: Any, lowered: Any) -> AbstractContextManager[Any]:
    """A context to enter around the inner compilation of one graph; writes the stages into a subfolder of `folder`.

    Args:
        folder: of the report; None writes nothing and only feeds torch's structured trace (off without TORCH_TRACE).
        number: of the graph in its backend, from 1.
        captured: the GraphModule of Dynamo.
        record: the graph's `GraphRecord`; `plan` may be None (no site, or the graph is refused).
        lowered: the `Lowered` graph, or None.
    """
    _trace(number, record, lowered)
    if folder is None:
        return nullcontext()
    from kvpass.debug.report import GraphReport

    return GraphReport(folder, number, captured, record, lowered)


def linked(page: Path, title: str) -> None:
    """A page about a cache was written: if it lies in the folder of a debug report of this process, that links it."""
    report = sys.modules.get("kvpass.debug.report")
    if report is not None:
        report.link(page.resolve(), title)


def _trace(number: int, record: Any, lowered: Any) -> None:
    """Sites, plan and rewritten graph as artifacts of torch's structured trace: tlparse lists them with the graph."""
    _artifact(f"kvpass_{number}_sites", "json", lambda: json.dumps(record.table.to_dict()))
    if record.plan is not None:
        _artifact(f"kvpass_{number}_plan", "json", record.plan.to_json)
    if lowered is not None:
        _artifact(f"kvpass_{number}_rewritten", "string", lambda: _readable(lowered))


def _artifact(name: str, encoding: str, payload: Any) -> None:
    from torch._logging import trace_structured  # type: ignore[attr-defined]  # not in its __all__

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def _readable(lowered: Any) -> str:
    from kvpass.debug.source import readable

    return readable(lowered.gm, "rewritten graph")
