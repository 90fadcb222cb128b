"""Two checkouts of kvpass against each other, prefill by prefill and decode step by decode step, in turns.

    python -P examples/bench/commits.py OTHER_PYTHON [--cases 2048x8,4096x1] [--policies full,h2o,..] [--rounds 30]

OTHER_PYTHON is the interpreter of an environment in which the other checkout is installed (its .venv/bin/python). Each
side is a process of its own with the same script, weights and prompt; the driver lets them work by turns, so that the
machine's drift hits both alike. Prints medians, ratios (this one / the other) and whether both said the same tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.side import Side

WARM_UP = 4
"""Decode steps; by then the first decode (static lengths) and the general one are compiled."""


def work(job: dict[str, Any]) -> None:
    """A side: reads `prefill`, `peak`, `step` or `tokens` from stdin, answers seconds, bytes or token ids."""
    import smollm2
    import torch

    import kvpass
    from bench.contenders import Contender, Spec, prompt
    from bench.timing import timed

    with torch.no_grad():
        model, tokenizer = smollm2.load(layers=job["layers"])
        ids = prompt(tokenizer, job["context"], job["batch"])
        contender = Contender(Spec("", "eager", job["policy"], job["budget"]), model, job["context"] + 100)
        print(json.dumps({"ready": str(Path(kvpass.__file__).parent)}), flush=True)
        asked = {
            "prefill": lambda: timed(lambda: contender.prefill(ids)),
            "peak": lambda: peak_of_a_prefill(contender, ids, job["padding"]),
            "step": lambda: timed(contender.step),
            "tokens": lambda: contender.said,
        }
        for line in sys.stdin:
            print(json.dumps({"said": asked[line.strip()]()}), flush=True)


def peak_of_a_prefill(contender: Any, ids: Any, padding: int) -> int:
    """Most bytes that the tensors of a prefill have together, its cache among them; the first columns are padding."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    contender.cache = contender.token = None
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if padding else {}
    contender.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)  # compiles
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        contender.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def compared(sides: list[Side], prefills: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each side, their ratio, and its quartiles over the rounds."""
    for side in sides:
        side.ask("prefill")  # compiles
    read = [turned([side.ask("prefill") for side in turned(sides, at)], at) for at in range(prefills)]
    peaks = [side.ask("peak") / 1e6 for side in sides]
    for side in sides:
        for _ in range(WARM_UP):
            side.ask("step")
    steps = [turned([side.ask("step") for side in turned(sides, at)], at) for at in range(rounds)]
    same = sides[0].ask("tokens") == sides[1].ask("tokens")
    return {"prefill": summary(read), "step": summary(steps), "same": same, "peaks": peaks}


def turned(items: list[Any], at: int) -> list[Any]:
    """Two items, in the other order at every second turn."""
    return items[::-1] if at % 2 else items


def summary(times: list[list[float]]) -> dict[str, Any]:
    ratios = sorted(new / old for new, old in times)
    quartiles = (
        statistics.quantiles(ratios, n=4) if len(ratios) > 3 else [ratios[0], ratios[len(ratios) // 2], ratios[-1]]
    )
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return {"new": medians[0], "old": medians[1], "ratio": statistics.median(ratios), "quartiles": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", help="python of the other checkout's environment")
    parser.add_argument("--cases", default="2048x8,4096x1", help="context x batch, with commas")
    parser.add_argument("--policies", default="full,h2o,snapkv,ada_snapkv")
    parser.add_argument("--prefills", type=int, default=2, help="timed prefills of each side")
    parser.add_argument("--rounds", type=int, default=30, help="timed decode steps of each side")
    parser.add_argument("--padding", type=int, default=0, help="columns of it in the prefill whose peak is read")
    parser.add_argument("--layers", type=int, help="of the model; all")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    if not args.other:
        parser.error("say which python has the other checkout installed")
    head = "| case | policy | prefill, s: this, other | ratio | peak of tensors, MB: this, other "
    head += "| step, ms: this, other | ratio (quartiles) | tokens |"
    print(f"{head}\n| {' | '.join(['---'] * 8)} |", flush=True)
    start = time.time()
    for case in args.cases.split(","):
        context, batch = (int(part) for part in case.split("x"))
        for policy in args.policies.split(","):
            job = {"context": context, "batch": batch, "policy": policy, "budget": 1.0 if policy == "full" else 0.2}
            job |= {"padding": args.padding, "layers": args.layers}
            work_on = ["-P", __file__, "--work", json.dumps(job)]
            sides = [Side([python, *work_on]) for python in (sys.executable, args.other)]
            found = compared(sides, args.prefills, args.rounds)
            prefill, step = found["prefill"], found["step"]
            low, _, high = step["quartiles"]
            print(
                f"| {case} | {policy} | {prefill['new']:.2f}, {prefill['old']:.2f} | {prefill['ratio']:.3f} | "
                f"{found['peaks'][0]:.1f}, {found['peaks'][1]:.1f} | "
                f"{1e3 * step['new']:.1f}, {1e3 * step['old']:.1f} | {step['ratio']:.3f} ({low:.3f} to {high:.3f}) | "
                f"{'the same' if found['same'] else 'DIFFER'} |",
                flush=True,
            )
            for side in sides:
                side.close()
    print(f"\nthis: {sides[0].ready}; other: {sides[1].ready}; {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
