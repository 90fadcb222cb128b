"""kvpass beside NVIDIA's kvpress, pair by pair, on the same prompts and in the same bytes: docs/quality-kvpress.md.

    python -P examples/quality/pairs.py --kvpress /path/of/kvpress/bin/python [--model smollm2] [--kinds prompt,steps]
                  [--budgets 0.2] [--trials 8] [--round 4] [--context 1024] [--seed 3] [--only reach,snapkv] [--render]

`prompt`: compressed in one go, then asked. `steps`: the last 256 tokens of the text come one by one, then questions.
kvpress runs in an environment of its own (peer.py says which). Trials go round by round over all rows of both, so that
a run that is stopped leaves as many of each; finished ones are kept in .cache/quality-pairs. Writes examples/quality/
results/pairs/<model>-<date>-<machine>.json, .cache/quality-pairs/<model>/metrics/<run>/metrics.json as kvpress'
evaluation has it, and the page.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import smollm2
import torch
from bench import machine
from transformers.utils import logging as transformers_logging

from kvpass.policy.load import names
from quality import pairs_page
from quality.judge import judged
from quality.measure import Lab
from quality.pairing import KINDS, OWN, PAIRS, REPLAYS, refused, theirs
from quality.reference import call
from quality.replay import answers, collected
from quality.run import commit, listed
from quality.store import Cell, Settings
from quality.tasks.needles import TASKS
from quality.versus import LIKE_PEER, PEER, preset

HERE = Path(__file__).resolve().parent
STEPS, APART = 256, 7
"""Tokens that come one by one, and how many of them lie between two looks at what is held."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", help="the interpreter of kvpress' environment; without it, kvpass' rows alone")
    parser.add_argument("--model", choices=checkpoints.LOAD, default="smollm2")
    parser.add_argument("--kinds", type=listed, default=list(KINDS))
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in listed(text)], default=[0.2])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--round", type=int, default=4, help="trials of a row before the next row's turn")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--only", type=listed, help="rows whose policy is one of these, and the full cache")
    parser.add_argument("--render", action="store_true", help="measure nothing: write what is finished")
    parser.add_argument("--side", choices=("kvpass", "kvpress"), default="kvpass", help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def folder_of(args: argparse.Namespace, kind: str) -> Path:
    folder = smollm2.cache_folder().parent / "quality-pairs" / args.model / f"{kind}-s{args.seed}-{args.round}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def grid(args: argparse.Namespace, kind: str, side: str) -> list[Cell]:
    """One side's rows, the full cache first."""
    rows = [one for one in theirs(kind) if not refused(args.model, one)]
    if side == "kvpass":
        rows = [one for one in PAIRS[kind] if one not in OWN or one in names()]
    rows = [one for one in rows if args.only is None or preset(one.removeprefix(PEER)) in args.only]
    cells = [Cell("full", 1.0, args.context)] if side == "kvpass" else []
    return cells + [Cell(one, budget, args.context) for budget in args.budgets for one in rows]


def asking(lab: Lab, cell: Cell) -> AbstractContextManager[Any]:
    """kvpress says what it wants before it repeats a prompt; kvpass has it said by the caller."""
    if cell.policy.removesuffix(LIKE_PEER) not in REPLAYS or not cell.policy.endswith(LIKE_PEER):
        return nullcontext()
    import kvpass

    said = lab.prompts.encode("\n\nRepeat the previous context exactly.")
    return kvpass.instructed([*said, *lab.prompts.tail])


@torch.no_grad()
def stepwise(lab: Lab, cell: Cell, trials: list[int]) -> list[dict[str, Any]]:
    """Of each trial: NLL of the text that came token by token, answers to questions behind it, and shares held: mean
    and largest of a dense cache of the whole text.
    """
    asked = [lab.prompts.trial(cell.context, index) for index in trials]
    ids = torch.tensor([lab.prompts.prompt(one, cell.context, "agnostic", None) for one in asked])
    cache, losses, held, prompt = lab.cache(), [], [], cell.context - STEPS
    with lab.decoding(cell, int(cell.budget * cell.context), prompt) as model:
        logp = call(model, ids[:, :prompt], cache)
        for at in range(prompt, cell.context):
            losses.append(-logp.gather(-1, ids[:, at : at + 1])[:, 0])
            logp = call(model, ids[:, at : at + 1], cache)
            if at % APART == 0:
                held.append(lab.held(cache)["bytes"])
        dense = lab.held(cache)["dense_bytes"]
    found = {}
    for task in TASKS:
        second = torch.tensor([lab.prompts.follow_up(one, "agnostic", task) for one in asked])
        found[task] = judged(model, copy.deepcopy(cache), second, [one.questions[task] for one in asked])
    text = torch.stack(losses).mean(0).tolist()
    shares = {"held": sum(held) / len(held) / dense, "end": max(held) / dense}
    return [
        {"answers": {task: found[task][at] for task in TASKS}, "text": text[at], **shares} for at in range(len(trials))
    ]


def prompted(lab: Lab, cell: Cell, trials: list[int]) -> list[dict[str, Any]]:
    """Of each trial: its answers, and what was held."""
    model = lab.compiled(cell)
    with asking(lab, cell):
        return answers(lab, cell, model, trials)


def parts(args: argparse.Namespace, kind: str, begin: int) -> list[list[int]]:
    """Trials of a round that are measured together: kvpress takes one prompt at a time."""
    trials = [*range(begin, min(begin + args.round, args.trials))]
    return [[one] for one in trials] if args.side == "kvpress" and kind == "prompt" else [trials]


def measured(lab: Lab, args: argparse.Namespace, kind: str, trials: list[int]) -> Iterator[str]:
    """One side's rows, whatever is not on disk."""
    measure, begin = stepwise if kind == "steps" else prompted, trials[0]
    for cell in grid(args, kind, args.side):
        path = folder_of(args, kind) / f"{cell.name}-{begin}.json"
        if path.exists():
            continue
        stamp = f"kvpress {version('kvpress')}" if args.side == "kvpress" else commit()
        try:
            found = measure(lab, cell, trials)
        except Exception as error:  # either library's: said, and the rest goes on
            yield f"{kind} {cell.name} failed: {type(error).__name__}: {error}"
            continue
        path.write_text(json.dumps({"commit": stamp, "trials": found}, indent=1) + "\n")
        nll = [one["nll"] for trial in found for one in trial["answers"].values()]
        yield f"{kind} {path.stem}: answer NLL {sum(nll) / len(nll):.3f}, held {100 * found[0]['held']:.1f} %"


def laboratory(args: argparse.Namespace) -> Lab:
    make = Lab if args.side == "kvpass" else importlib.import_module("quality.peer").PeerLab
    lab: Lab = make(*checkpoints.load(args.model), Settings(args.trials, seed=args.seed))
    return lab


def run(args: argparse.Namespace) -> None:
    lab = laboratory(args)
    if args.begin is not None:
        for trials in parts(args, args.kinds[0], args.begin):
            for said in measured(lab, args, args.kinds[0], trials):
                print(said, flush=True)
        return
    for begin in range(0, args.trials, args.round):
        for kind in args.kinds:
            for said in measured(lab, args, kind, *parts(args, kind, begin)):
                print(said, flush=True)
            if args.kvpress:
                own = ["--side", "kvpress", "--kinds", kind, "--begin", str(begin)]
                subprocess.run([args.kvpress, "-P", __file__, *sys.argv[1:], *own], check=True)


def publish(args: argparse.Namespace) -> Path:
    """Everything that is finished of these settings, and the page of all models."""
    found = {"date": date.today().isoformat(), "machine": machine.describe(), "seed": args.seed, "model": args.model}
    found["title"], found["command"] = checkpoints.TITLES[args.model], shlex.join(["pairs.py", *sys.argv[1:]])
    for kind in KINDS:
        cells = [cell for side in ("kvpass", "kvpress") for cell in grid(args, kind, side)]
        found[kind] = collected(cells, folder_of(args, kind))
    folder = HERE / "results" / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.model}-{found['date']}-{machine.slug(found['machine'])}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    pairs_page.metrics(found, folder_of(args, "prompt").parent / "metrics")
    return pairs_page.write(folder, HERE.parent.parent / "docs")


def main() -> None:
    args = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not args.render:
        run(args)
    if args.begin is None:
        print(f"wrote {publish(args)}")


if __name__ == "__main__":
    main()
