"""What was measured, in a JSON file beside the policy: a run that is cut off goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvpass.errors import PolicyError


@dataclass
class Row:
    """Of one candidate; `search` and `held_out` have one mapping for each window, see `judge.Marks`.

    Attributes:
        over: it was measured for as long as it kept up.
        error: why it could not run, one line.
        seconds: that it took, tracing included.
    """

    name: str
    data: dict[str, Any]
    kind: str
    search: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    error: str = ""
    seconds: float = 0.0


@dataclass
class Record:
    """All rows of one search, by the key of their candidate.

    Attributes:
        about: what makes figures comparable: model, text, budget, windows, versions.
        spent: seconds, over all runs.
    """

    path: Path
    about: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    spent: float = 0.0

    @staticmethod
    def open(path: Path, about: dict[str, Any], fresh: bool = False) -> Record:
        """The record at `path`, or an empty one.

        Raises:
            PolicyError: the file is of another search, or none of ours.
        """
        if fresh or not path.exists():
            return Record(path, about)
        again = "give --fresh to begin anew, or another --out"
        try:
            data = json.loads(path.read_text())
            rows = {key: Row(**row) for key, row in data["rows"].items()}
            record = Record(path, data["about"], rows, float(data["spent"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise PolicyError("this is no record of a search", where=str(path), hint=again) from None
        differs = [key for key in about if record.about.get(key) != about[key]]
        if differs:
            what = f"this record is of another search: other {', '.join(differs)}"
            raise PolicyError(what, where=str(path), hint=again)
        return record

    def save(self) -> None:
        """Written beside and renamed: a run that is cut off leaves no half file."""
        rows = {key: asdict(row) for key, row in self.rows.items()}
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps({"about": self.about, "spent": self.spent, "rows": rows}, indent=1) + "\n")
        os.replace(scratch, self.path)
