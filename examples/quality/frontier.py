"""`make frontier`: quality against bytes held: eviction alone, storage alone, and both, on SmolLM2-135M-Instruct.

    python -P examples/quality/frontier.py [--policies "h2o + int4,snapkv + dense"] [--shares 0.125,0.2]
                                           [--context 1024] [--trials 4] [--jobs 2] [--render]

Everything is counted: codes, scales, whole copies, positions and statistics, and free slots. Finished cells are kept in
.cache/quality-bytes. Writes examples/quality/results/bytes/<date>-<machine>.* and docs/quality-bytes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
from bench import machine
from transformers.utils import logging as transformers_logging
from workers import wide_console

from quality import answers, render, shown, stats
from quality.estimate import estimate, minutes
from quality.measure import Lab
from quality.run import commit, listed, run
from quality.store import Cell, Settings, Store
from quality.versus import evicts_by, held_as

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHARES = (0.125, 0.2)
EVICTING = ("h2o", "roco", "snapkv", "ada_snapkv", "layer_defensivekv", "streaming_llm")
STORES = ("dense", "int8", "int8:int4", "int4")
ALONE = ("int8", "fp8_e4m3", "int4", "int4_symmetric", "int2")
READ = """A row is a policy and what its slots hold: `h2o + int4` evicts by h2o and holds 4-bit codes (`int8:int4`:
8-bit keys, 4-bit values), `full + int4` evicts nothing, `h2o + dense` is eviction alone. `held` is everything that a
cache holds, of what an unmodified one holds in float32: codes, scales, whole copies of the newest 32 and the first 4
tokens, positions, statistics, free slots. The columns are those of [quality.md](quality.md), on the same texts and
questions: an answer counts if all five digits are right, KL is along the true text, intervals are over texts. Needles
alone hide what few bits cost: look at KL and perplexity too. A model of 135M parameters with heads of 64 is the hard
case for few bits. Finished cells are kept, so rows may come from several runs with other `--policies` and `--shares`;
the command above is that of the last.
"""
COLUMNS = ["policy", "held %", "KL", "same token %", "perplexity", "aware", "agnostic", "answer NLL"]


def cells_of(policies: list[str] | None, shares: list[float], context: int) -> list[Cell]:
    """All that is asked for; storage alone has no budget."""
    if policies is None:
        policies = [f"full + {store}" for store in ALONE]
        policies += [f"{name} + {store}" for name in EVICTING for store in STORES]
    cells = [Cell("full", 1.0, context)]
    cells += [Cell(p, 1.0, context) for p in policies if evicts_by(p) == "full"]
    return cells + [Cell(p, share, context) for share in shares for p in policies if evicts_by(p) != "full"]


def kind(policy: str) -> str:
    """Of a row: which of the two saves bytes."""
    if policy == "full":
        return "neither"
    if held_as(policy) == "dense":
        return "eviction alone"
    return "storage alone" if evicts_by(policy) == "full" else "both"


def held(cell: dict[str, Any]) -> float:
    """All bytes, of an unmodified cache's."""
    found = cell["held"]
    return float((found["bytes"] + found["overhead_bytes"]) / found["dense_bytes"])


def right(cell: dict[str, Any], mode: str) -> str:
    found = [entry["right"] for task in cell["retrieval"][mode].values() for entry in task]
    return f"{sum(found)}/{len(found)}"


def row(cell: dict[str, Any]) -> list[str]:
    text = render.text_row(cell)
    nll = shown.spread(answers.answer_nll(cell), 2)
    return [text[0], f"{100 * held(cell):.1f}", *text[2:4], text[5], right(cell, "aware"), right(cell, "agnostic"), nll]


def best(cells: list[dict[str, Any]], what: str) -> dict[str, Any] | None:
    """Of one kind, the row with the least KL."""
    own = [cell for cell in cells if kind(cell["policy"]) == what]
    return min(own, key=lambda cell: stats.mean(cell["text"]["kl"])[0], default=None)


def verdict(cells: list[dict[str, Any]]) -> list[str]:
    """The best of each kind, side by side."""
    found = [(what, best(cells, what)) for what in ("eviction alone", "both")]
    rows = [[what, *row(cell)] for what, cell in found if cell is not None]
    return shown.table(["least KL of", *COLUMNS], rows)


def page(results: dict[str, Any], image: str) -> str:
    lines = ["# Quality by bytes", "", *render.facts(results), "", READ, f"![quality against bytes]({image})", ""]
    cells = results["cells"]
    alone = [cell for cell in cells if cell["budget"] == 1.0]
    lines += ["## Storage alone", "", *shown.table(COLUMNS, map(row, sorted(alone, key=held, reverse=True)))]
    for share in sorted({cell["budget"] for cell in cells if cell["budget"] < 1.0}):
        mine = sorted((c for c in cells if c["budget"] == share), key=lambda c: stats.mean(c["text"]["kl"])[0])
        lines += ["", f"## {100 * share:g} % of the bytes", "", *verdict(mine), "", "All, least KL first:", ""]
        lines += shown.table(COLUMNS, map(row, mine))
    lines += [f"- failed: {name}: {words}" for name, words in results["failed"].items()]
    return "\n".join([*lines, ""])


def draw(results: dict[str, Any], path: Path) -> None:
    """KL and right answers against bytes held, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    labels = ("KL to the full cache, nats", "right answers, both modes, %")
    for axis, label in zip(axes, labels, strict=True):
        for what in ("eviction alone", "storage alone", "both"):
            mine = [cell for cell in results["cells"] if kind(cell["policy"]) == what]
            x = [100 * held(cell) for cell in mine]
            kl = [max(stats.mean(cell["text"]["kl"])[0], 1e-6) for cell in mine]
            found = [50 * sum(answers.accuracy(cell, mode) for mode in ("aware", "agnostic")) for cell in mine]
            y = kl if axis is axes[0] else found
            axis.scatter(x, y, label=what)
            for cell, at, value in zip(mine, x, y, strict=True):
                axis.annotate(cell["policy"], (at, value), fontsize=6, textcoords="offset points", xytext=(4, 2))
        axis.set(xlabel="held, % of an unmodified cache's bytes, all counted", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def publish(store: Store, command: str) -> list[Path]:
    facts = machine.describe()
    results = {
        "date": date.today().isoformat(), "command": command, "machine": facts, "settings": {**vars(store.settings)},
        "failed": store.errors(), "cells": store.cells(), "commit": commit(),
    }  # fmt: skip
    folder = HERE / "results" / "bytes"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{results['date']}-{machine.slug(facts)}"
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, folder / f"{name}.png")
    written, docs = ROOT / "docs" / "quality-bytes.md", ROOT / "docs"
    link = os.path.relpath(folder / name, docs)
    note = f"<!-- Generated by `make frontier` from {link}.json: do not edit. -->\n"
    written.write_text(note + page(results, f"{link}.png"))
    return [folder / f"{name}.json", folder / f"{name}.png", written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=listed, help='names such as "h2o + int4", with commas')
    parser.add_argument("--shares", type=lambda text: [float(part) for part in listed(text)], default=[*SHARES])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--render", action="store_true", help="measure nothing: write table and picture")
    args, console = parser.parse_args(), wide_console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    root = smollm2.cache_folder().parent / "quality-bytes"
    store = Store(Settings(args.trials, args.steps, 0), root)
    if not args.render:
        lab, cells = Lab(*smollm2.load(), store.settings), cells_of(args.policies, args.shares, args.context)
        todo = [cell for cell in cells if not store.done(cell)]
        seconds, ground = estimate(lab, store, todo, args.jobs)
        console.print(f"{len(cells)} cells, {len(todo)} to do: about {minutes(seconds)}, by {ground}", highlight=False)
        run(lab, store, cells, console, args.jobs)
    for path in publish(store, shlex.join(["python", "-P", "examples/quality/frontier.py", *sys.argv[1:]])):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
