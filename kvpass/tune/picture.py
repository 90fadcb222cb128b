"""Loss against bytes and against time, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpass.errors import KVPassError
from kvpass.tune.candidates import KINDS, Candidate
from kvpass.tune.judge import Expected
from kvpass.tune.race import Race
from kvpass.tune.record import Row
from kvpass.tune.table import seconds

COLOURS = {"one-pass": "tab:blue", "replay": "tab:orange", "codes": "tab:green"}


def draw(race: Race, finals: list[Candidate], full: Expected | None, path: Path, title: str) -> None:
    """Two panels for all candidates on the search windows, and one for the finals on the held-out ones.

    Raises:
        KVPassError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise KVPassError("no picture: matplotlib is not installed", hint='pip install "kvpass[report]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bytes_, time, steps) = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    rows = [(key, race.record.rows[key]) for key in race.made if race.record.rows[key].search]
    named = {one.key for one in (*race.leaders(), race.start[0])}
    for key, row in rows:
        held = 100 * row.search[0]["held"]
        _point(bytes_, race, key, row, held, named)
        if (read := seconds(row.search)) is not None:
            _point(time, race, key, row, read, named)
    for one in finals:
        row = race.record.rows[one.key]
        if row.held_out:
            loss, step = race.loss(row, held_out=True), 1000 * min(mark["step"] for mark in row.held_out)
            steps.plot(step, max(loss, 1e-6), "o", color=COLOURS[row.kind], markersize=9)
            steps.annotate(row.name, (step, max(loss, 1e-6)), textcoords="offset points", xytext=(6, 6), fontsize=8)
    bytes_.set(xlabel="bytes held, % of the full cache", ylabel="loss, nats a token", title="search: against bytes")
    time.set(xlabel=f"seconds for a prompt of {race.windows.context:,} tokens", title="search: against time")
    steps.set(xlabel="milliseconds for each later token", title="held-out text: against time")
    if full is not None:
        time.axvline(full.marks.read, color="gray", linestyle="--", label="the full cache, not compiled")
        steps.axvline(
            1000 * (full.marks.step or 0.0), color="gray", linestyle="--", label="the full cache, not compiled"
        )
    for axis in (bytes_, time, steps):
        axis.set_yscale("log")
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    for kind, words in KINDS.items():
        bytes_.plot([], [], "o", color=COLOURS[kind], label=words)
    bytes_.plot([], [], "o", color="gray", fillstyle="none", label="fell behind: fewer windows")
    for axis in (bytes_, time):
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _point(axis: Any, race: Race, key: str, row: Row, x: float, named: set[str]) -> None:
    whole = len(row.search) == len(race.windows.search)
    y = max(race.loss(row), 1e-6)
    marker = "D" if key == race.start[0].key else "o"
    axis.plot(x, y, marker, color=COLOURS[row.kind], fillstyle="full" if whole else "none")
    if key in named:
        axis.annotate(row.name, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
