"""The one reader of environment variables, and the stages that a debug report is written from."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any


def debug_folder(debug: bool | str | None) -> str | None:
    """Folder of the debug report: as given, `kvpass_debug` for True, else what KVPASS_DEBUG says (a folder, or 1)."""
    if debug is None:
        debug = os.environ.get("KVPASS_DEBUG") or False
    if debug in (False, "0", ""):
        return None
    return "kvpass_debug" if debug in (True, "1") else str(debug)


def stages(folder: str | None, number: int, captured: Any, record: Any, lowered: Any) -> Any:
    return nullcontext()
