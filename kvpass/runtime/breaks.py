"""Where Dynamo broke the graph of a call, and why, for errors that come of it."""

from __future__ import annotations

from typing import Any

MEND = (
    "keep what writes a cache and the attention over it in one graph: no .item(), print or other side effect, no "
    "branch on a tensor's data between the two"
)

MOST = 3
"""Lines that are told."""


def breaks() -> list[Any]:
    """Dynamo's reasons so far in this process, the oldest first; none in a torch that does not tell."""
    try:
        from torch._dynamo.utils import graph_break_reasons
    except ImportError:
        return []
    return list(graph_break_reasons)


def told(since: int) -> str:
    """The breaks since there were so many reasons, in words: the user's line and Dynamo's reason; "" if there were
    none.
    """
    found = dict.fromkeys(filter(None, map(_line, breaks()[since:])))
    if not found:
        return ""
    lines = [*found]
    more = f", and at {len(lines) - MOST} more lines" if len(lines) > MOST else ""
    return f"Dynamo broke the graph at {'; at '.join(lines[:MOST])}{more}"


def _line(reason: Any) -> str:
    stack = getattr(reason, "user_stack", None)
    if not stack:
        return ""
    frame, why = stack[-1], str(getattr(reason, "reason", "")).strip().splitlines()
    line = f": {frame.line}" if frame.line else ""
    return f"{frame.filename}:{frame.lineno} in {frame.name}{line}" + (f" [{why[0].rstrip(':.')}]" if why else "")
