"""From the newest results of pairs.py, one file for each model, to docs/quality-kvpress.md. Reads nothing but JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import stats
from quality.pairing import BEST, KINDS, PAIRS, REPLAYS, refused
from quality.render import table
from quality.replay_page import entries
from quality.tasks.needles import TASKS
from quality.versus import PEER

Row = dict[str, Any]
"""One row's cell in the results: policy, budget, context, commit, trials."""

COLUMNS = ["kvpass", "kvpress", "budget", "held %", "kvpress holds %", "right", "kvpress' right", "digits"]
COLUMNS += ["kvpress' digits", "answer NLL", "kvpress' NLL", "difference", "wins", "said"]
TEXT_COLUMNS = ["kvpass", "kvpress", "budget", "text NLL", "kvpress' text NLL", "difference", "wins", "said"]


def nlls(cell: Row) -> list[float]:
    return [one["nll"] for one in entries(cell)]


def best(cells: list[Row], budget: float) -> Row | None:
    """kvpress' press of one pass with the least answer NLL."""
    names = {PEER + name for name in REPLAYS}
    own = [c for c in cells if c["policy"].startswith(PEER) and c["policy"] not in names and c["budget"] == budget]
    return min(own, key=lambda c: stats.mean(nlls(c))[0], default=None)


def pairs(model: str, kind: str, cells: list[Row]) -> Iterator[tuple[Row, Row]]:
    """(kvpass' cell, kvpress' cell) of each measured pair; for a press that refuses the model, the best other."""
    by_name = {(c["policy"], c["budget"]): c for c in cells}
    for budget in sorted({c["budget"] for c in cells if c["policy"] != "full"}, reverse=True):
        for name, other in PAIRS[kind].items():
            ours, other = by_name.get((name, budget)), BEST if refused(model, other) else other
            theirs = best(cells, budget) if other == BEST else by_name.get((other, budget))
            if ours and theirs:
                yield ours, theirs


def compared(ours: list[float], theirs: list[float]) -> list[str]:
    """Both means, the difference and half of its 95 % t interval, wins, and what the interval says."""
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    middle, low, high = stats.mean(apart)
    said = "kvpass better" if high < 0 else "kvpass worse" if low > 0 else "not told apart"
    said = "the same" if max(map(abs, apart)) < 0.001 else said
    wins = f"{sum(one < 0 for one in apart)}/{len(apart)}"
    means = [f"{stats.mean(values)[0]:.3f}" for values in (ours, theirs)]
    return [*means, f"{middle:+.3f} ± {middle - low:.3f}", wins, said]


def names(ours: Row, theirs: Row) -> list[str]:
    return [f"`{ours['policy']}`", f"`{theirs['policy'].removeprefix(PEER)}`", f"{100 * ours['budget']:.0f} %"]


def row(ours: Row, theirs: Row) -> list[str]:
    both = (ours, theirs)
    held = [f"{100 * stats.mean([trial['held'] for trial in cell['trials']])[0]:.1f}" for cell in both]
    right = [f"{sum(one['right'] for one in entries(cell))}/{len(entries(cell))}" for cell in both]
    digits = [f"{sum(one['digits'] for one in entries(cell))}/{5 * len(entries(cell))}" for cell in both]
    return [*names(ours, theirs), *held, *right, *digits, *compared(nlls(ours), nlls(theirs))]


def text_row(ours: Row, theirs: Row) -> list[str]:
    return [*names(ours, theirs), *compared(*([trial["text"] for trial in cell["trials"]] for cell in (ours, theirs)))]


def ceiling(kind: str, cells: list[Row]) -> str:
    full = next(cell for cell in cells if cell["policy"] == "full")
    found = entries(full)
    said = f"Full cache: {sum(one['right'] for one in found)}/{len(found)} right, answer NLL "
    said += f"{stats.mean(nlls(full))[0]:.3f}"
    if kind == "steps":
        said += f", text NLL {stats.mean([trial['text'] for trial in full['trials']])[0]:.3f}"
    return f"{said}; {len(full['trials'])} texts, {len(TASKS)} questions each."


HEADS = {"prompt": "a prompt, compressed in one go", "steps": "token by token"}


def section(found: dict[str, Any]) -> list[str]:
    """One model's tables."""
    commits = sorted({cell["commit"] for kind in KINDS for cell in found[kind]})
    lines = [f"## {found['title']}", "", f"`{found['command']}`, {found['date']}, seed {found['seed']};"]
    lines += [f"{', '.join(commits)}; {found['machine'].get('cpu', '')}."]
    lines += [f"{word}." for word in sorted({refused(found["model"], PEER + name) for name in REPLAYS} - {""})]
    for kind in KINDS:
        cells = found[kind]
        rows = list(pairs(found["model"], kind, cells))
        if not rows:
            continue
        lines += ["", f"### {found['title']}, {HEADS[kind]}", "", ceiling(kind, cells), ""]
        lines += table(COLUMNS, [row(*both) for both in rows])
        if kind == "steps":
            lines += ["", *table(TEXT_COLUMNS, [text_row(*both) for both in rows])]
    return lines


def metrics(found: dict[str, Any], folder: Path) -> None:
    """kvpass' rows as kvpress' evaluation writes its own: RUN/metrics.json, by task the share of answers that are in
    what was said, in percent: `{"passkey": {"string_match": 87.5}, ..}`.
    """
    for cell in found["prompt"]:
        if cell["policy"].startswith(PEER):
            continue
        context, ratio = str(cell["context"]), f"{1 - cell['budget']:.2f}"
        own = folder / "__".join(["needles", context, found["model"], f"kvpass_{cell['policy']}", ratio])
        own.mkdir(parents=True, exist_ok=True)
        right = {task: [one["right"] for one in entries(cell, task)] for task in TASKS}
        scores = {task: {"string_match": round(100 * sum(some) / len(some), 2)} for task, some in right.items()}
        (own / "metrics.json").write_text(json.dumps(scores, indent=4) + "\n")


def write(folder: Path, docs: Path) -> Path:
    """The page: what is said around the tables stands in pairs.md beside this file."""
    newest = {path.name.split("-")[0]: path for path in sorted(folder.glob("*.json"))}
    sources = [newest[name] for name in sorted(newest, reverse=True)]
    lines = [line for path in sources for line in [*section(json.loads(path.read_text())), ""]]
    links = ", ".join(os.path.relpath(path, docs) for path in sources)
    note = f"<!-- Generated by examples/quality/pairs.py from {links}: do not edit. -->\n"
    page = docs / "quality-kvpress.md"
    before = (Path(__file__).parent / "pairs.md").read_text()
    page.write_text(note + before.replace("{tables}", "\n".join(lines).rstrip()))
    return page
