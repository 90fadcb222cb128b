"""What a search found, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvpass.tune.candidates import Candidate
from kvpass.tune.interval import half_width
from kvpass.tune.judge import Expected
from kvpass.tune.race import Race, losses
from kvpass.tune.record import Row

JUDGED = {
    "both": "the mean of text and copy",
    "text": "text alone",
    "copy": "copy alone",
}


def criterion(race: Race) -> str:
    """What a loss is, in words."""
    windows = race.windows
    return (
        f"loss: {JUDGED[race.judged]}. text: KL(full cache || policy), nats a token, over the {windows.after} tokens"
        f" that follow a prompt of {windows.context:,} after it was compressed; copy: the same where two passages"
        f" of the prompt are read again, from their token {windows.cue} on"
    )


def search_table(race: Race) -> str:
    """Every candidate, the best first; those that fell behind have figures of fewer windows."""
    own = race.start[0].key
    rows = {key: row for key, row in race.record.rows.items() if key in race.made and row.search}
    best = {one.key for one in race.leaders()}
    head = ("", "policy", "loss", "text", "copy", "copied %", "held %", "prompt s", "windows", "kind")
    lines: list[tuple[str, ...]] = [head]
    for key, row in sorted(rows.items(), key=lambda item: (-len(item[1].search), race.loss(item[1]))):
        mark = ("*" if key in best else "") + ("d" if key == own else "") + ("" if race.allowed(row) else "!")
        lines.append((mark, row.name, f"{race.loss(row):.4f}", *_figures(row.search), str(len(row.search)), row.kind))
    failed = [f"{row.name}: {row.error}" for row in race.record.rows.values() if row.error]
    legend = "* best of its kind, d the default, ! holds more bytes than the default may"
    return "\n".join([aligned(lines), legend, *failed])


def finals_table(race: Race, finals: Sequence[Candidate], full: Expected | None) -> str:
    """On windows that nothing was chosen by; differences to the default are paired."""
    default = losses(race.record.rows[race.start[0].key].held_out, race.judged)
    head = ("policy", "loss", "to the default", "text", "copy", "copied %", "held %", "prompt s", "steps KL", "step ms")
    lines: list[tuple[str, ...]] = [head]
    for one in finals:
        row = race.record.rows[one.key]
        if row.held_out:
            own = losses(row.held_out, race.judged)
            lines.append((one.name, f"{statistics.mean(own):.4f}", _apart(own, default), *_figures(row.held_out)))
            lines[-1] = (*lines[-1], *_stepwise(row.held_out))
    if full is not None:
        marks = full.marks
        figures = ("0.0000", "0.0000", f"{100 * marks.right:.0f}", "100.0", f"{marks.read:.2f}", "0.0000")
        lines.append(("the full cache", "0.0000", "", *figures, f"{1000 * (marks.step or 0):.0f}"))
    return aligned(lines)


def _figures(marks: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of the seconds the least, so that tracing is not in them."""
    text, copied, right, held = (
        statistics.mean(mark[key] for mark in marks) for key in ("text", "copy", "right", "held")
    )
    read = seconds(marks)
    return f"{text:.4f}", f"{copied:.4f}", f"{100 * right:.0f}", f"{100 * held:.1f}", f"{read:.2f}" if read else "-"


def seconds(marks: list[dict[str, Any]]) -> float | None:
    """Of a prompt: the least over the windows after the first, in which graphs were traced."""
    return min((mark["read"] for mark in marks[1:]), default=None)


def _stepwise(marks: list[dict[str, Any]]) -> tuple[str, str]:
    kl, step = (statistics.mean(mark["steps"] for mark in marks), min(mark["step"] for mark in marks))
    return f"{kl:.4f}", f"{1000 * step:.0f}"


def _apart(own: list[float], default: list[float]) -> str:
    differences = [a - b for a, b in zip(own, default, strict=False)]
    if not any(differences):
        return "-"
    half = half_width(differences)
    return f"{statistics.mean(differences):+.4f}" + (f" ± {half:.4f}" if half < 1e9 else "")


def one_line(name: str, row: Row | None, race: Race) -> str:
    """A candidate's result as progress says it; without a row, that it is being tried."""
    if row is None:
        return f"{name} ..."
    if row.error:
        return f"{name}: {row.error}"
    more = "" if race.allowed(row) else ", more than allowed"
    _, _, right, held, _ = _figures(row.search)
    number = len(row.search)
    return f"{name}: loss {race.loss(row):.4f}, {right} % copied, holds {held} %{more}; {number} windows"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [all(not cell[:1].isdigit() for cell in column[1:]) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if left else cell.rjust(w) for cell, w, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    )
