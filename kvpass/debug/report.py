"""Writes the numbered stages of one graph around its inner compilation, and keeps the folder's index.

Owns file names, and what belongs to which run: what an earlier process wrote into the folder is removed before the
first graph of this one. A stage that cannot be written becomes a line in the index, never an error of the compilation.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvpass.debug import neighbourhood, page
from kvpass.debug.output_code import OutputCode
from kvpass.debug.source import readable, site_diff

log = logging.getLogger(__name__)

OURS = re.compile(r"graph_\d{3,}_(prefill|extend|decode|declined|untouched)$")


@dataclass
class Entry:
    """One graph of the index: what the page shows, and which files and notes there are."""

    name: str
    title: str
    facts: dict[str, str]
    sites: list[dict[str, Any]]
    declined: list[dict[str, Any]]
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """The graphs of one backend. `key` is its policy object, which all its plans share."""

    key: Any
    title: str
    base: int
    entries: list[Entry] = field(default_factory=list)


_FOLDERS: dict[Path, list[Run]] = {}
"""Runs of this process by folder."""

_PAGES: dict[Path, dict[Path, str]] = {}
"""Pages about caches that this process wrote into those folders, with their titles."""


def link(written: Path, title: str) -> None:
    """Let the index of the folder that a page about a cache lies in link to it. The page is there, whatever happens to
    the index.
    """
    root = next((root for root in _FOLDERS if written.is_relative_to(root)), None)
    if root is not None:
        _PAGES.setdefault(root, {})[written] = title
        try:
            write_index(root)
        except OSError:
            log.warning("debug report in %s: index.html was not written", root, exc_info=True)


def write_index(root: Path) -> None:
    """Write index.html anew."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "index.html").write_text(page.index(root, _FOLDERS[root], _PAGES.get(root, {})))


class GraphReport(AbstractContextManager["GraphReport"]):
    """Entered around the inner compilation of one graph: stages 1 to 6 before it, stage 7 and the index after it."""

    def __init__(self, folder: str, number: int, captured: Any, record: Any, lowered: Any) -> None:
        self.root = Path(folder).expanduser().resolve()
        self.captured, self.record, self.lowered = captured, record, lowered
        self.run = _run_of(self.root, record.plan, number)
        self.entry = _entry(self.run, number, record, lowered)
        self.path = self.root / self.entry.name
        self.code = OutputCode()
        self.started = 0.0

    def __enter__(self) -> GraphReport:
        self.run.entries.append(self.entry)
        self._stage("01_captured.py", lambda: readable(self.captured, "captured graph"))
        self._tables()
        if self.lowered is not None:
            self._stage("04_rewritten.py", lambda: readable(self.lowered.gm, "rewritten graph"))
            self._diffs()
            self._drawings()
        self.code.__enter__()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.entry.facts["inner compiler"] = f"{time.perf_counter() - self.started:.2f} s"
        self.code.__exit__(*exc)
        self._stage("07_inner.txt", lambda: self.code.describe(exc[1]))
        for at, source in enumerate(self.code.paths, 1):
            self._stage(f"07_inner_{at}.py", Path(source).read_text)
        self._guarded("index.html", lambda: write_index(self.root))
        log.info("debug report: %s", self.root / "index.html")

    def _tables(self) -> None:
        table, plan = self.record.table, self.record.plan
        self._stage("02_sites.txt", lambda: f"{table}\n")
        self._stage("02_sites.json", lambda: json.dumps(table.to_dict(), indent=2) + "\n")
        if plan is not None:
            self._stage("03_plan.txt", lambda: f"{plan}\n")
            self._stage("03_plan.json", lambda: plan.to_json() + "\n")

    def _diffs(self) -> None:
        for planned in self.record.plan.sites:
            site = planned.site
            name = re.sub(r"[^\w.]+", "_", site.name)
            self._stage(
                f"05_diff_{site.layer:02d}_{name}.diff", partial(site_diff, self.captured, self.lowered.gm, site)
            )

    def _drawings(self) -> None:
        """The first site stands for its layer: the others differ in names only."""
        site = self.record.plan.sites[0].site
        for name, graph in (
            ("06_layer_before.svg", lambda: neighbourhood.before(self.captured, site)),
            ("06_layer_after.svg", lambda: neighbourhood.after(self.lowered.gm, site)),
        ):
            self._guarded(name, partial(self._draw, name, graph, site))

    def _draw(self, name: str, graph: Callable[[], Any], site: Any) -> None:
        from kvpass.debug.drawing import draw

        title = f"{site.name}, {site.phase.value}: {'as captured' if 'before' in name else 'rewritten by kvpass'}"
        draw(graph(), self.path / name, title)
        self.entry.files.append(name)

    def _stage(self, name: str, text: Callable[[], str]) -> None:
        self._guarded(name, lambda: self._write(name, text()))

    def _write(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)
        self.entry.files.append(name)

    def _guarded(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except ImportError as error:
            hint = (
                "pip install 'kvpass[report]'" if error.name and error.name.startswith("matplotlib") else "see the log"
            )
            self._note(f"{name} was not written: {error}; {hint}")
        except Exception as error:
            log.debug("debug report", exc_info=True)
            self._note(f"{name} was not written: {type(error).__name__}: {error}")

    def _note(self, text: str) -> None:
        log.warning("debug report in %s: %s", self.path, text)
        self.entry.notes.append(text)


def _run_of(root: Path, plan: Any, number: int) -> Run:
    """The run a graph belongs to; the first one of this process clears the folder."""
    if root not in _FOLDERS:
        _clear(root)
    runs = _FOLDERS.setdefault(root, [])
    key = plan.policy if plan is not None else None
    for run in reversed(runs):
        if (key is None or run.key is key) and run.base + number not in _numbers(run):
            return run
    title = f"policy {key.name}, budget {key.budget}" if key is not None else "no plan"
    runs.append(Run(key, title, max((max(_numbers(run), default=0) for run in runs), default=0)))
    return runs[-1]


def _numbers(run: Run) -> set[int]:
    return {int(entry.name.split("_")[1]) for entry in run.entries}


def _clear(root: Path) -> None:
    """Remove what a report wrote, and nothing else."""
    if not root.is_dir():
        return
    for old in root.iterdir():
        if OURS.match(old.name) and (old / "01_captured.py").is_file():
            shutil.rmtree(old, ignore_errors=True)
    (root / "index.html").unlink(missing_ok=True)


def _entry(run: Run, number: int, record: Any, lowered: Any) -> Entry:
    table = record.table
    phase = table.sites[0].phase.value if lowered is not None else "declined" if table.declined else "untouched"
    facts = {"sites": str(len(table.sites)), "declined": str(len(table.declined))}
    facts |= {"inner": record.inner} if record.inner else {}
    if record.plan is not None:
        facts |= {
            "fingerprint": record.plan.fingerprint,
            "rule": record.plan.sites[0].rule.encode() if record.plan.sites else "",
        }
    facts |= {stage: f"{seconds * 1000:.1f} ms" for stage, seconds in record.seconds.items()}
    tables = table.to_dict()
    name, title = f"graph_{run.base + number:03d}_{phase}", f"graph {number}: {phase}"
    steps = record.plan.to_dict()["steps"] if record.plan is not None else []
    return Entry(name, title, facts, tables["sites"], tables["declined"], steps=steps)
