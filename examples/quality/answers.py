"""What cells say of answers: tables whose columns are the tasks that were asked, and means over those that count.

A task counts where the full cache gets at least half of it right: what the model cannot do anyway tells nothing of a
policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quality.prompts import MODES
from quality.shown import held, percent, share_cell, spread, table
from quality.tasks import TASKS

ABLE = 0.5
"""Share of right answers with the full cache from which on a task counts."""

ONE_TABLE = 4
"""With more tasks than this there is a table for each mode."""

Cells = Sequence[dict[str, Any]]


def asked(cells: Cells) -> list[str]:
    """Tasks that any of the cells was asked, in the order of the registry."""
    return [task for task in TASKS if any(task in cell["retrieval"]["agnostic"] for cell in cells)]


def share(cell: dict[str, Any], mode: str, task: str) -> float:
    """Right answers."""
    found = cell["retrieval"][mode][task]
    return sum(entry["right"] for entry in found) / len(found)


def counted(cells: Cells, mode: str) -> list[str]:
    """Tasks of a mode that all of the cells were asked, and that the full cache among them can do."""
    full = [cell for cell in cells if cell["policy"] == "full"]
    shared = [task for task in asked(cells) if all(task in cell["retrieval"][mode] for cell in cells)]
    return [task for task in shared if all(share(cell, mode, task) >= ABLE for cell in full)]


def accuracy(cell: dict[str, Any], mode: str, tasks: Sequence[str] | None = None) -> float:
    """Right answers over all tasks, or some."""
    found = cell["retrieval"][mode]
    entries = [entry["right"] for task in tasks or found for entry in found[task]]
    return sum(entries) / len(entries)


def answer_nll(cell: dict[str, Any], tasks: Sequence[str] | None = None) -> list[float]:
    """One value for each trial: the mean over its questions, of all tasks or some; asked after the compression."""
    found = cell["retrieval"]["agnostic"]
    by_trial = zip(*(found[task] for task in tasks or found), strict=True)
    return [sum(entry["nll"] for entry in entries) / len(entries) for entries in by_trial]


def gone(cell: dict[str, Any], mode: str, tasks: Sequence[str]) -> str:
    """Percent of the answers that stand in the text of which a token is gone in all heads of all layers."""
    known = [e["gone"] for task in tasks for e in cell["retrieval"][mode].get(task, []) if "gone" in e]
    return percent(sum(tokens > 0 for tokens in known) / len(known)) if known else ""


def tables(cells: Cells) -> list[str]:
    """Of cells of one context and budget, in the order given."""
    tasks, count = asked(cells), {mode: counted(cells, mode) for mode in MODES}
    whole = len(tasks) <= ONE_TABLE
    lines: list[str] = []
    for modes in [MODES] if whole else [(mode,) for mode in MODES]:
        columns = ["policy", "held %", *(f"{task} {mode}" if whole else task for task in tasks for mode in modes)]
        told = [mode for mode in modes if any(gone(cell, mode, tasks) for cell in cells)]
        columns += [f"all {mode} %" for mode in modes] + [f"gone {mode} %" for mode in told]
        with_nll = "agnostic" in modes
        rows = []
        for cell in cells:
            shares = [share_cell(e) if (e := cell["retrieval"][m].get(t)) else "" for t in tasks for m in modes]
            shares += [percent(accuracy(cell, mode, count[mode])) if count[mode] else "" for mode in modes]
            shares += [gone(cell, mode, tasks) for mode in told]
            nll = [spread(answer_nll(cell, count["agnostic"]), 2) if count["agnostic"] else ""] if with_nll else []
            rows.append([f"`{cell['policy']}`", f"{100 * held(cell):.1f}", *shares, *nll])
        said = "Retrieval, same order:" if whole else f"Retrieval, {modes[0]}, same order:"
        lines += ["", said, "", *table([*columns, "answer NLL"] if with_nll else columns, rows)]
    return lines + left_out(cells)


def left_out(cells: Cells) -> list[str]:
    """Which tasks count for nothing, and why."""
    words = []
    for mode in MODES:
        shares = {task: share(c, mode, task) for c in cells if c["policy"] == "full" for task in c["retrieval"][mode]}
        words += [f"{task} {mode} ({percent(value)} % right)" for task, value in shares.items() if value < ABLE]
    if not words:
        return []
    return ["", f"Not in `all` and `answer NLL`, since the full cache fails: {', '.join(words)}."]
