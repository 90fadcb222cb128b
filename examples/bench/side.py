"""A contender in another environment: a process that answers lines with lines, in turns with everybody else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any


class Side:
    """A process at work. It writes `{"ready": ..}` first, then for each line of its stdin `{"said": ..}`.

    Raises SystemExit where it fails; its own words are on stderr.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()["ready"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # libraries talk too
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} failed (exit {self.process.wait()}; its words are above)")
        answered: dict[str, Any] = json.loads(line)
        return answered

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()["said"]

    def close(self) -> None:
        self.process.communicate("")
