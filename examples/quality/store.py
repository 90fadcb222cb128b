"""Cells and their files: one JSON file for each (policy, budget, context) that is finished."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import smollm2

from quality.tasks import DEFAULT


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share; cells of other settings are kept apart.

    Attributes:
        trials: retrieval prompts for each task and question mode, and texts to go on with.
        steps: tokens of each continuation.
        seed: of texts, needles and depths.
        tasks: what is asked. A cell that lacks some of them is finished by those alone.
    """

    trials: int
    steps: int = 128
    seed: int = 0
    tasks: tuple[str, ...] = field(default=DEFAULT, compare=False)

    @property
    def key(self) -> str:
        return f"t{self.trials}-n{self.steps}-s{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One measurement. The policy `full` has budget 1.0, and is measured once per context."""

    policy: str
    budget: float
    context: int

    @property
    def name(self) -> str:
        return f"{self.context}-{self.budget:g}-{self.policy}"


class Store:
    """The folder of one set of settings."""

    def __init__(self, settings: Settings, root: Path | None = None) -> None:
        self.settings = settings
        self.folder = (root or smollm2.cache_folder().parent / "quality") / settings.key
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def error_path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.error"

    def reference_path(self, context: int) -> Path:
        return self.folder / f"{context}-reference.pt"

    def fresh(self) -> None:
        """Forget everything measured under these settings."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def known(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured of a cell so far."""
        return json.loads(self.path(cell).read_text()) if self.path(cell).exists() else None

    def done(self, cell: Cell) -> bool:
        """Whether it is measured, and asked all of these settings' tasks."""
        known = self.known(cell)
        return known is not None and {*self.settings.tasks} <= {*known["retrieval"]["agnostic"]}

    def save(self, cell: Cell, found: dict[str, Any]) -> None:
        """Written beside and renamed: a broken run leaves no half file."""
        scratch = self.path(cell).with_suffix(".part")
        scratch.write_text(json.dumps({**asdict(cell), **found}, indent=1) + "\n")
        os.replace(scratch, self.path(cell))
        self.error_path(cell).unlink(missing_ok=True)

    def fail(self, cell: Cell, words: str) -> None:
        self.error_path(cell).write_text(words + "\n")

    def cells(self) -> list[dict[str, Any]]:
        """Everything finished, in order of context and budget."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda c: (c["context"], c["budget"], c["policy"]))

    def errors(self) -> dict[str, str]:
        """First line of what went wrong, by cell."""
        return {path.stem: path.read_text().splitlines()[0] for path in sorted(self.folder.glob("*.error"))}
