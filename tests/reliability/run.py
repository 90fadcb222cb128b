"""`make reliability`: the soak, the state machine and the tests of what goes wrong, with their figures in a page.

    python -P tests/reliability/run.py [--only soak,machine,tests] [--tokens 20000] [--conversations 300]
                                       [--examples 2000] [--seed N]

Each part that is done is kept in .cache/reliability.json; when there is one of each, docs/reliability.md is written.
Some 40 minutes on one core. The machine draws other examples at each run; --seed repeats one. Exits with 1 if a part
failed, after its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / ".cache" / "reliability.json"


def find_packages() -> None:
    """Make the test packages importable, as tests/conftest.py does for pytest."""
    sys.path.insert(0, str(ROOT / "examples"))
    for name in ("oracle", "models", "reliability"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "tests" / name)]
        sys.modules[name] = package
    os.environ |= {"OMP_NUM_THREADS": "1", "KVPASS_PROGRESS": "0", "TORCH_LOGS": "-all"}


def bar(what: str) -> Callable[[int, int], None]:
    """Progress on stderr, each percent once."""
    shown = [-1]

    def tell(done: int, total: int) -> None:
        percent = 100 * done // total
        if percent != shown[0]:
            shown[0] = percent
            end = "\n" if done >= total else ""
            print(f"\r{what}: {done:,} of {total:,} ({percent} %) {end}", end="", file=sys.stderr, flush=True)

    return tell


def soak(args: argparse.Namespace) -> dict[str, Any]:
    from reliability.soak import BUDGET, POLICY, SAMPLES, Text, conversations

    start = time.perf_counter()
    text = Text(args.tokens)
    long = text.soak(tell=bar("soak, tokens"))
    ties = text.judged(SAMPLES, tell=bar("soak, judged"))
    short = conversations(args.conversations, tell=bar("soak, conversations"))
    for found in (long, short):
        found.check()
    figures = {"text": long.to_dict(), "conversations": short.to_dict(), "ties": ties, "samples": SAMPLES}
    return {**figures, "policy": POLICY, "budget": BUDGET, "seconds": time.perf_counter() - start}


def state_machine(args: argparse.Namespace) -> dict[str, Any]:
    import hypothesis
    from models import traced
    from reliability.machine import machine, settings_of
    from reliability.policies import NAMES
    from reliability.talk import DONE

    import kvpass.model.compilation

    kvpass.model.compilation.isolated = traced.isolated  # all policies share what Dynamo traced
    tell = bar("state machine, examples")

    class Told(machine(NAMES)):  # type: ignore[misc]  # made by a function
        def teardown(self) -> None:
            super().teardown()
            tell(min(DONE["examples"], args.examples), args.examples)

    start = time.perf_counter()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"state machine: --seed {seed}", file=sys.stderr)
    run = hypothesis.stateful.run_state_machine_as_test
    run(hypothesis.seed(seed)(Told), settings=hypothesis.settings(settings_of(args.examples), derandomize=False))
    seconds = time.perf_counter() - start
    return {"done": dict(DONE), "policies": len(NAMES), "seed": seed, "seconds": seconds}


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """Each file in a process of its own."""
    from reliability.page import TESTS

    rows = {}
    for file in TESTS:
        with TemporaryDirectory() as folder:
            report, start = Path(folder) / "report.xml", time.perf_counter()
            asked = [sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}", str(ROOT / "tests" / file)]
            done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stdout, done.stderr, file=sys.stderr)
                raise SystemExit(1)
            suite = next(ElementTree.parse(report).iter("testsuite"))
            rows[file] = {"cases": int(suite.get("tests", 0)), "seconds": time.perf_counter() - start}
        print(f"tests: {file}, {rows[file]['cases']} cases", file=sys.stderr)
    return {"files": rows}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "soak": soak,
    "machine": state_machine,
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="soak, machine, tests; with commas")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--examples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, help="of the state machine's examples")
    args = parser.parse_args()
    find_packages()
    import torch
    from reliability.page import page, versions

    torch.set_num_threads(1)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    RECORDS.parent.mkdir(exist_ok=True)
    for name in args.only.split(","):
        records[name] = {**PARTS[name](args), "versions": versions()}
        RECORDS.write_text(json.dumps(records))
    if set(records) == set(PARTS):
        (ROOT / "docs" / "reliability.md").write_text(page(records))


if __name__ == "__main__":
    main()
