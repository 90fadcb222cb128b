"""The JSON of a stage: rows that are on disk as soon as they are known, so that an ended stage leaves what it has."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENDS = "KVPASS_GPU_ENDS"
"""Environment variable: when the stage will be ended, as time.time() says it."""

MEANING = {
    "cuda": "measured on this GPU",
    "cpu": "no GPU: small shapes in Triton's interpreter; times, bandwidths and rates mean nothing",
}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all, if the process is ended meanwhile."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def left() -> float:
    """Seconds until the stage will be ended."""
    return float(os.environ.get(ENDS, "inf")) - time.time()


class Record:
    """Collects the rows of one stage in $OUT/<stage>.json."""

    def __init__(self, stage: str, device: str, **facts: Any) -> None:
        self.path = Path(os.environ["OUT"]) / f"{stage}.json"
        self.rows: list[dict[str, Any]] = []
        self.data = {"stage": stage, "device": device, "figures": MEANING[device], **facts, "rows": self.rows}
        self.save()

    def save(self) -> None:
        write(self.path, self.data)

    def add(self, row: dict[str, Any]) -> None:
        """A row; one that has an `error` makes the stage fail."""
        self.rows.append(row)
        print(row, flush=True)
        self.save()

    def attempt(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """The row with what `measure` gives; an exception is the row's error, and the stage goes on."""
        try:
            found = measure()
        except Exception as error:
            self.failed(row, error)
        else:
            self.add(row | found)

    def failed(self, row: dict[str, Any], error: Exception) -> None:
        """The row with what went wrong. Called where the exception is handled."""
        traceback.print_exc()
        self.add(row | {"error": f"{type(error).__name__}: {error}"[:500]})

    def finish(self) -> None:
        """Exits: with 1 if a row has an error, or if there is no row."""
        self.save()
        sys.exit(1 if not self.rows or any("error" in row for row in self.rows) else 0)
