"""`make quality`: what each policy's eviction costs, on SmolLM2-135M-Instruct and real text.

    python -P examples/quality/run.py [--full] [--policies a,b] [--budgets 0.1,0.2] [--contexts 1024] [--trials 4]
                                      [--tasks all] [--jobs 2] [--beside-kvpress] [--fresh] [--render] [--estimate]

Finished cells are kept in .cache/quality and skipped on a rerun. Writes examples/quality/results/<date>-<machine>.*
and docs/quality.md. --render only writes those, from the cells there are (or from the newest results). Tasks that are
named later are asked of finished cells too. --check asks what the full cache can do: docs/quality-tasks.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
import torch
from bench import machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging
from workers import wide_console

from kvpass.errors import PolicyError
from kvpass.policy.files import check_files
from kvpass.policy.load import names
from kvpass.policy.policy import Policy
from quality import render, tasks_page
from quality.estimate import estimate, minutes
from quality.measure import Lab
from quality.pool import outcomes
from quality.reference import load_or_measure
from quality.store import Cell, Settings, Store
from quality.tasks import DEFAULT, TASKS, named
from quality.versus import beside_peer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONTEXTS, BUDGETS, TRIALS = (1024, 2048, 4096), (0.1, 0.2, 0.5), 20
DEFAULT_CONTEXTS, DEFAULT_BUDGETS, DEFAULT_TRIALS = (1024,), (0.1, 0.2), 4


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def tasks(text: str) -> tuple[str, ...]:
    try:
        return named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


PROBED = {"judge_q"}
"""Policies whose weights are not kvpass' to read: the caller appends trained embeddings to the prompt."""


def measurable() -> list[str]:
    """Policies that evict, and `full`; one that needs trained weights or tables, and lacks them, cannot be measured.
    What only holds codes is measured by frontier.py.
    """
    found = []
    for name in sorted({*names()} - PROBED):
        with suppress(PolicyError):
            check_files(Policy.load(name))
            if name == "full" or not Policy.load(name).keeps_all:
                found.append(name)
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=listed, help="names, with commas; if left out, all that need no weights")
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in listed(text)])
    parser.add_argument("--contexts", type=lambda text: [int(part) for part in listed(text)])
    parser.add_argument("--trials", type=int, help="retrieval prompts for each task and mode, and texts")
    parser.add_argument(
        "--tasks", type=tasks, default=DEFAULT, help=f"names, with commas, or all: {', '.join(TASKS)}; the first three"
    )
    parser.add_argument("--check", action="store_true", help="the full cache alone, all tasks: which ones can it do?")
    parser.add_argument("--steps", type=int, default=128, help="tokens of each continuation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="cells at a time, a process for each"
    )
    parser.add_argument("--beside-kvpress", action="store_true", help="what both have, evicting as kvpress does")
    parser.add_argument("--full", action="store_true", help="1k, 2k and 4k; 10, 20 and 50 %%; 20 trials: many hours")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells of these settings")
    parser.add_argument("--render", action="store_true", help="measure nothing: write table, picture and docs")
    parser.add_argument("--estimate", action="store_true", help="measure nothing: say how long it would take")
    args = parser.parse_args(given)
    args.budgets = args.budgets or list(BUDGETS if args.full else DEFAULT_BUDGETS)
    args.contexts = args.contexts or list(CONTEXTS if args.full else DEFAULT_CONTEXTS)
    args.trials = args.trials or (TRIALS if args.full else DEFAULT_TRIALS)
    if args.policies and args.beside_kvpress:
        parser.error("--beside-kvpress says by itself which policies")
    if args.check:
        args.policies, args.tasks = ["full"], args.tasks if args.tasks != DEFAULT else named("all")
    args.policies = args.policies or measurable()
    unknown = sorted(set(args.policies) - set(names()))
    if unknown:
        parser.error(f"no policy {unknown[0]!r}; there are {', '.join(names())}")
    args.policies = beside_peer() if args.beside_kvpress else args.policies
    return args


def grid(policies: list[str], budgets: list[float], contexts: list[int]) -> list[Cell]:
    """Cells in the order they are measured: `full` of a context first, it is the ceiling of all others."""
    cells = []
    for context in contexts:
        cells += [Cell("full", 1.0, context)] if "full" in policies else []
        cells += [Cell(p, b, context) for b in budgets for p in policies if p != "full"]
    return cells


def commit() -> str:
    """The tree that is measured, with a plus when files of the library differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    tracked = ["--porcelain", "--untracked-files=no", "kvpass", "kernels", "patterns"]
    dirty = subprocess.run([*git, "status", *tracked], capture_output=True, text=True).stdout.strip()
    return (head or "unknown") + ("+" if dirty else "")


def run(lab: Lab, store: Store, cells: list[Cell], console: Console, jobs: int = 1) -> int:
    """Measures what is not on disk; how many cells that were. A policy that fails is noted, and the rest goes on."""
    todo, stamp, measured = [cell for cell in cells if not store.done(cell)], commit(), 0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task("starting", total=len(cells), completed=len(cells) - len(todo))

        def say(doing: str) -> None:
            shown.update(task, description=doing)

        for context in dict.fromkeys(cell.context for cell in todo):
            say(f"{context} tokens: the full cache of Hugging Face")
            with torch.no_grad():
                parts = lab.plain_chunks(context)
                load_or_measure(store.reference_path(context), lab.model, parts, lab.settings.steps)
        for cell, found in outcomes(lab, store, todo, jobs, say):
            if isinstance(found, str):
                store.fail(cell, found)
                shown.console.print(f"{cell.name} failed: {found}", highlight=False, markup=False)
            else:
                store.save(cell, {**found, "commit": stamp, "date": date.today().isoformat()})
                measured += 1
                shown.console.print(f"{cell.name}: {found['seconds']:.0f} s", highlight=False)
            shown.advance(task)
    return measured


def results(store: Store, command: str) -> dict[str, Any]:
    """Everything measured under these settings, and what is missing of the whole grid."""
    cells = store.cells()
    have = {Cell(c["policy"], c["budget"], c["context"]) for c in cells}
    policies = measurable()
    whole = grid(policies, list(BUDGETS), list(CONTEXTS))
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": machine.describe(),
        "settings": {**vars(store.settings)},
        "policies": policies,
        "weightless": [name for name in names() if name not in policies],
        "missing": [cell.name for cell in whole if cell not in have],
        "failed": store.errors(),
        "cells": cells,
    }


def publish(store: Store, command: str) -> list[Path]:
    """Results and docs from the finished cells; with none, docs from the newest results."""
    folder, docs = HERE / "results", ROOT / "docs"
    found = results(store, command)
    if not found["cells"]:
        return render.newest(found, folder, docs)
    return render.write(found, folder, f"{found['date']}-{machine.slug(found['machine'])}", docs)


def main() -> None:
    args, console = arguments(), wide_console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    store = Store(Settings(args.trials, args.steps, args.seed, args.tasks))
    command = shlex.join(["python", "-P", "examples/quality/run.py", *sys.argv[1:]])
    if not args.render:
        if args.fresh:
            store.fresh()
        lab = Lab(*smollm2.load(), store.settings)
        cells = grid(args.policies, args.budgets, args.contexts)
        todo = [cell for cell in cells if not store.done(cell)]
        seconds, ground = estimate(lab, store, todo, args.jobs)
        console.print(f"{len(cells)} cells, {len(todo)} to do: about {minutes(seconds)}, by {ground}", highlight=False)
        if args.estimate:
            return
        run(lab, store, cells, console, args.jobs)
    paths = tasks_page.publish(store, command, HERE, ROOT / "docs") if args.check else publish(store, command)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
