"""Quality against bytes held: one panel each for aware and agnostic retrieval and for KL, a row for each context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quality import answers, shown, stats, versus

MARKERS = "osv^D<>pPX*h"
MASKED = 0.95
"""What holds more (the full cache, policies that mask) would leave no room for the rest."""

NAMED = 3
"""The best of each panel have their names beside them."""

PANELS = (("aware", "right answers, question inside, %"), ("agnostic", "right answers, question after, %"))


def points(cells: list[dict[str, Any]], panel: str, tasks: list[str]) -> tuple[list[float], list[float]]:
    """x: K and V held in percent of dense; y: right answers to the tasks that count in percent, or KL."""
    cells = sorted(cells, key=shown.held)
    held = [100 * shown.held(cell) for cell in cells]
    if panel == "kl":
        return held, [max(stats.mean(cell["text"]["kl"])[0], 1e-6) for cell in cells]
    return held, [100 * answers.accuracy(cell, panel, tasks) for cell in cells]


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    contexts = sorted({cell["context"] for cell in results["cells"]})
    size = (18, 1.5 + 6 * len(contexts))
    figure, axes = plt.subplots(len(contexts), 3, figsize=size, squeeze=False, layout="constrained")
    names = sorted(name for name in {cell["policy"] for cell in results["cells"]} if versus.is_own(name))
    for row, context in zip(axes, contexts, strict=True):
        mine = [cell for cell in results["cells"] if cell["context"] == context]
        for axis, (panel, label) in zip(row, (*PANELS, ("kl", "KL to the full cache, nats")), strict=True):
            lines(axis, mine, names, panel)
            axis.set(title=f"{context:,} tokens: {label}", xlabel="K and V held, % of dense")
        row[2].set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, ncols=2)
    machine = results["machine"]
    figure.suptitle(f"SmolLM2-135M-Instruct, {results['settings']['trials']} trials, torch {machine['torch']}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lines(axis: Any, cells: list[dict[str, Any]], names: list[str], panel: str) -> None:
    """A line per policy over its budgets; `full` is a dashed level, except in the KL panel, where it is rounding."""
    import matplotlib

    tasks = [] if panel == "kl" else answers.counted(cells, panel)
    colours = matplotlib.colormaps["tab20"]
    ends: list[tuple[float, float, float, str]] = []
    for index, name in enumerate(names):
        mine = [cell for cell in cells if cell["policy"] == name]
        if not mine:
            continue
        style = {"color": "black", "linestyle": ":"} if name == "random" else {"color": colours(index % 20)}
        held, values = points(mine, panel, tasks)
        ends.append((values[-1] if panel == "kl" else -values[-1], held[-1], values[-1], name))
        axis.plot(held, values, marker=MARKERS[index % len(MARKERS)], label=name, **style)
    for rank, (_, x, y, name) in enumerate(sorted(ends)[:NAMED]):
        if y > 0:  # a rate of 0 is nobody's best
            place = (6, 9 * rank - 12 if panel == "kl" else 6 - 9 * rank)
            axis.annotate(name, (x, y), textcoords="offset points", xytext=place, fontsize=8)
    shared = [100 * shown.held(cell) for cell in cells if shown.held(cell) < MASKED]
    axis.set_xlim(0, 1.4 * max(shared, default=100))
    full = [cell for cell in cells if cell["policy"] == "full"]
    if full and panel != "kl":
        axis.axhline(points(full, panel, tasks)[1][0], color="gray", linestyle="--", label="full")
    axis.grid(alpha=0.3)
