"""Draws decoders from the grammar of spellings (spelling.py), and checks each (check.py).

python -P tests/spellings/run.py [--draws N] [--first SEED] [--jobs N] [--resume] [--nearby]
python -P tests/spellings/run.py --only "Spelling(...)" | --styles

A draw is a seed. What was checked is kept in .cache/spellings.jsonl as it comes, so that a run that was cut goes on
with --resume. --nearby checks plain decoders with one choice of their own instead, each once; --styles writes the table
of host styles in docs/support.md. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import types
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / ".cache" / "spellings.jsonl"


def find_packages() -> None:
    """Make the test packages importable, as tests/conftest.py does for pytest."""
    for name in ("oracle", "models", "spellings"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "tests" / name)]
        sys.modules[name] = package
    os.environ |= {"OMP_NUM_THREADS": "1", "KVPASS_PROGRESS": "0", "TORCH_LOGS": "-all"}


def settle() -> None:
    """A process that compiles a thousand models, as tests/conftest.py has it."""
    import torch

    torch.set_num_threads(1)
    torch._dynamo.config.fake_tensor_cache_enabled = False
    torch._dynamo.config.run_gc_after_compile = False
    gc.set_threshold(50_000, 20, 50)


def one(task: tuple[int, str]) -> dict[str, Any]:
    """A seed's draw, or a spelling that is given."""
    from spellings.check import POLICIES, check
    from spellings.spelling import draw, leaning, parse

    seed, text = task
    chance = random.Random(seed)
    spelling = parse(text) if text else draw(leaning(chance))
    policy = chance.choice(POLICIES)
    outcome = check(spelling, policy, shared=True)
    return {"seed": seed, "spelling": repr(spelling), "policy": policy, **outcome.record()}


def checked(tasks: list[tuple[int, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """Records as they come; a process makes way for a new one after 100, as torch remembers what it has traced."""
    with get_context("spawn").Pool(jobs, start, maxtasksperchild=100) as pool:
        yield from pool.imap_unordered(one, tasks)


def start() -> None:
    find_packages()
    settle()


def known(resume: bool) -> list[dict[str, Any]]:
    """What an earlier run left."""
    if not resume or not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def only(text: str) -> int:
    from spellings.check import POLICIES, check
    from spellings.spelling import objection, parse

    spelling, failed = parse(text), False
    if objection(spelling):
        sys.exit(objection(spelling))
    for policy in POLICIES:
        outcome = check(spelling, policy)
        failed |= outcome.failed
        print(f"{policy}: {outcome.kind} {outcome.reason} ({outcome.graphs} graphs, {outcome.seconds:.1f} s)")
        print(outcome.text)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--first", type=int, default=0, help="the first draw's seed (0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has checked")
    parser.add_argument("--nearby", action="store_true", help="plain decoders with one choice of their own")
    parser.add_argument("--styles", action="store_true", help="the table of host styles in docs/support.md")
    parser.add_argument("--only", default="", help="one spelling, as a failure's line shows it")
    options = parser.parse_args()
    if options.only or options.styles:
        start()
        from spellings import host_styles

        return only(options.only) if options.only else host_styles.write()
    from spellings.outcomes import bar, table
    from spellings.spelling import nearby

    tasks = [(seed, "") for seed in range(options.first, options.first + options.draws)]
    if options.nearby:
        tasks = [(seed, repr(spelling)) for seed, spelling in enumerate(nearby())]
    records = known(options.resume)
    done = {record["seed"] for record in records}
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a" if options.resume else "w") as kept:
        for record in checked([task for task in tasks if task[0] not in done], options.jobs):
            records.append(record)
            kept.write(json.dumps(record) + "\n")
            kept.flush()
            bar(records, len(tasks))
    print(table(records))
    return any(record["kind"] not in ("matched", "declined") for record in records)


if __name__ == "__main__":
    find_packages()
    sys.exit(main())
