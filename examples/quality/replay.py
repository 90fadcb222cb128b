"""Answers to questions that come after the compression, where the prompt was read again: docs/quality-replay.md.

    python -P examples/quality/replay.py [--policies kvzip,retold,kvzip_plus] [--budgets 0.1,0.2] [--trials 16]
                                         [--context 1024] [--seed 1] [--rows 4] [--round 8] [--model gemma] [--render]

Trials go round by round over all cells, so that a run that is stopped has as many of each; finished ones are kept in
.cache/quality-replay. Writes examples/quality/results/replay/<date>-<machine>.json and docs/quality-replay.md; of
another model, results/replay/<model>/.. and docs/quality-replay-<model>.md. Seed 1: the settings of `retold` were
chosen on texts of seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import smollm2
import torch
from bench import machine
from transformers.utils import logging as transformers_logging

from quality import replay_page
from quality.judge import judged
from quality.measure import Lab
from quality.reference import call
from quality.run import commit, listed
from quality.store import Cell, Settings
from quality.tasks.needles import TASKS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=checkpoints.LOAD, default="smollm2")
    parser.add_argument("--policies", type=listed, default=["kvzip", "retold", "kvzip_plus"])
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in listed(text)], default=[0.1, 0.2])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="prompts in one batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=8, help="trials of a cell before the next cell's turn")
    parser.add_argument("--render", action="store_true", help="measure nothing: write what is finished")
    return parser.parse_args()


def grid(args: argparse.Namespace) -> list[Cell]:
    cells = [Cell("full", 1.0, args.context)]
    return cells + [Cell(name, budget, args.context) for budget in args.budgets for name in args.policies]


@torch.no_grad()
def answers(lab: Lab, cell: Cell, model: Any, trials: list[int]) -> list[dict[str, Any]]:
    """Of each trial: its answers by task, and what a row held of a dense cache's bytes, after the prompt and at the end
    of the last answer.
    """
    asked = [lab.prompts.trial(cell.context, index) for index in trials]
    cache, found = lab.cache(), {}
    call(model, torch.tensor([lab.prompts.prompt(one, cell.context, "agnostic", None) for one in asked]), cache)
    held, own = share(lab, cache), cache
    for task in TASKS:
        own = copy.deepcopy(cache)
        second = torch.tensor([lab.prompts.follow_up(one, "agnostic", task) for one in asked])
        found[task] = judged(model, own, second, [one.questions[task] for one in asked])
    both = {"held": held, "end": share(lab, own)}
    return [{"answers": {task: found[task][at] for task in TASKS}, **both} for at in range(len(trials))]


def share(lab: Lab, cache: Any) -> float:
    """Bytes of K and V, of a dense cache's."""
    held = lab.held(cache)
    return float(held["bytes"] / held["dense_bytes"])


def measured(lab: Lab, cells: list[Cell], args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Whatever is not on disk, some trials of each cell at a time; says what was done."""
    for begin in range(0, args.trials, args.round):
        for cell in cells:
            path = folder / f"{cell.name}-{begin}.json"
            if path.exists():
                continue
            model, found = lab.compiled(cell), []
            for first in range(begin, min(begin + args.round, args.trials), args.rows):
                found += answers(lab, cell, model, [*range(first, min(first + args.rows, args.trials))])
            path.write_text(json.dumps({"commit": commit(), "trials": found}, indent=1) + "\n")
            yield f"{path.stem}: {sum(one['right'] for trial in found for one in trial['answers'].values())} right"


def collected(cells: list[Cell], folder: Path) -> list[dict[str, Any]]:
    """Finished trials of the cells that have any: as many of each as the one with the fewest has."""
    out = []
    for cell in cells:
        paths = sorted(folder.glob(f"{cell.name}-*.json"), key=lambda one: int(one.stem.rsplit("-", 1)[1]))
        parts = [json.loads(path.read_text()) for path in paths]
        if parts:
            trials = [trial for part in parts for trial in part["trials"]]
            out.append({**asdict(cell), "commit": parts[-1]["commit"], "trials": trials})
    least = min((len(cell["trials"]) for cell in out), default=0)
    return [{**cell, "trials": cell["trials"][:least]} for cell in out]


def main() -> None:
    args = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    own = "" if args.model == "smollm2" else args.model
    cells, results = grid(args), HERE / "results" / "replay" / own
    folder = smollm2.cache_folder().parent / "quality-replay" / own / f"s{args.seed}-r{args.rows}-{args.round}"
    folder.mkdir(parents=True, exist_ok=True)
    if not args.render:
        lab = Lab(*checkpoints.load(args.model), Settings(args.trials, seed=args.seed))
        for said in measured(lab, cells, args, folder):
            print(said, flush=True)
    found = {"date": date.today().isoformat(), "machine": machine.describe(), "seed": args.seed}
    found["title"], found["model"] = checkpoints.TITLES[args.model], own
    found["command"] = shlex.join(["python", "-P", "examples/quality/replay.py", *sys.argv[1:]])
    found["cells"] = collected(cells, folder)
    if found["cells"]:
        results.mkdir(parents=True, exist_ok=True)
        path = results / f"{found['date']}-{machine.slug(found['machine'])}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {replay_page.write(max(results.glob('*.json')), ROOT / 'docs')}")


if __name__ == "__main__":
    main()
