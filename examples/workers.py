"""Running a measurement in a process of its own, with its progress shown in this one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


def say(line: str) -> None:
    """Called by a worker: what it is doing now."""
    print(line, flush=True)


def wide_console() -> Console:
    """The terminal; in a file or a pipe, where rich would assume 80 columns, wide enough for the tables."""
    return Console() if sys.stdout.isatty() else Console(width=130)


def progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.fields[doing]}"), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run_worker(script: Path, job: dict[str, Any], folder: Path, shown: Progress) -> dict[str, Any]:
    """Runs `python -P script JOB FOLDER` and shows what it says; the figures in FOLDER/<name>.json.

    A worker that fails ends this process too, after its error output.
    """
    task = shown.add_task(job["name"], total=None, doing="starting")
    watched([sys.executable, "-P", str(script), json.dumps(job), str(folder)], job["name"], shown, task)
    shown.update(task, doing="done", total=1, completed=1)
    result: dict[str, Any] = json.loads((folder / f"{job['name']}.json").read_text())
    return result


def watched(command: list[str], title: str, shown: Progress, task: TaskID, folder: Path | None = None) -> None:
    """Runs a worker and shows what it says. One that fails ends this process too, after its error output."""
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        last = "starting"
        for line in worker.stdout or ():
            last = line.strip() or last
            shown.update(task, doing=last)
            if not shown.console.is_terminal:  # a log: the spinner cannot be seen, so print the lines
                shown.console.print(f"{title}: {last}", highlight=False)
        if worker.wait() != 0:
            errors.seek(0)
            shown.stop()
            print(errors.read(), file=sys.stderr)
            raise SystemExit(f"'{title}' failed at: {last} (exit {worker.returncode}; its words are above)")
