"""Which families of transformers work, proven on tiny random models: writes docs/support.md and docs/support.json.

python -P tests/support/sweep.py [--jobs N] [--only llama,gpt2] [--resume] [--quick | --graphs | --masks]
    [--limit SECONDS]

Each family runs in a process of its own. --graphs counts graph breaks and --masks says what masks are taken for, with
one attention implementation of each family; they keep the rest of the committed docs/support.json. Exits with 1 if a
family that passed there fails now.
With --only nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = ROOT / ".cache" / "support"
ATTENTIONS = ("sdpa", "eager")
OTHER = "other shape"
"""Of a family's results: heads grouped where they were not, or the other way round, and windows where they were off;
with the first attention implementation that ran.
"""


def find_packages() -> None:
    """Make the test packages importable, as tests/conftest.py does for pytest."""
    sys.path[:0] = [str(HERE), str(ROOT / "examples")]
    for name in ("oracle", "models"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "tests" / name)]
        sys.modules[name] = package
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


SKIP = {
    "full": {"sdpa": (), "eager": ()},
    "quick": {"sdpa": ("eviction", "bytes", "masks", "graphs"), "eager": ("graphs",)},
    "graphs": dict.fromkeys(ATTENTIONS, ("eviction", "bytes", "masks")),
    "masks": dict.fromkeys(ATTENTIONS, ("identity", "eviction", "bytes", "graphs")),
}
"""Checks that a mode leaves out."""
PARTIAL = ("graphs", "masks")
"""Modes that try one attention implementation of each family, and keep what is committed of the others' checks."""


def child(family: str, mode: str) -> None:
    """Run one family, both attention implementations (to count graphs: the first that runs), and leave the results in
    its file as they come.
    """
    import torch
    import transformers
    from case import run

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {}

    def save(attention: str, result: Any) -> None:
        results[attention] = result
        part(family).write_text(json.dumps(results, indent=1))

    for attention in ATTENTIONS:
        skip = SKIP[mode][attention]
        save(attention, run(family, attention, lambda result, a=attention: save(a, result), skip))
        if mode in PARTIAL and results[attention]["status"] == "ran":
            save("eager", results.get("eager", {"status": "not tried"}))
            break
    first = next((a for a in ATTENTIONS if results[a]["status"] == "ran"), None)
    if mode in ("full", "quick") and first is not None:
        skip = ("masks", "graphs") if mode == "full" else ("eviction", "bytes", "masks", "graphs")
        save(OTHER, run(family, first, lambda result: save(OTHER, result), skip, other=True))
    save("done", True)


def part(family: str) -> Path:
    return PARTS / f"{family}.json"


def finished(family: str) -> dict[str, Any] | None:
    """What an earlier run left for this family, if it came to its end."""
    found = json.loads(part(family).read_text()) if part(family).exists() else {}
    return found if found.get("done") else None


def measure(family: str, limit: float, mode: str) -> dict[str, Any]:
    """Results of one family by attention implementation, from a process with a time limit."""
    part(family).unlink(missing_ok=True)
    start = time.monotonic()
    why = _in_a_process(family, limit, mode)
    results = json.loads(part(family).read_text()) if part(family).exists() else {}
    if not results.get("done"):
        for attention in ATTENTIONS:
            cut = results.setdefault(attention, {"status": "not started"})
            if cut["status"].startswith(("building", "running", "checking", "not started")):
                cut |= {"status": "cut off", "why": f"{why}, while {cut['status']}"}
        results["done"] = True
    results["seconds"] = round(time.monotonic() - start, 1)
    part(family).write_text(json.dumps(results, indent=1))
    return results


def _in_a_process(family: str, limit: float, mode: str) -> str:
    """Run one family in a fork of this process, which has imported everything; how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            with open(PARTS / f"{family}.log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            child(family, mode)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return f"the process ended with {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.2)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"took longer than {limit:.0f} s"


def warm_up() -> None:
    """Import what every family needs, once."""
    import case  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def sweep(families: list[str], jobs: int, limit: float, resume: bool, mode: str) -> dict[str, Any]:
    """All families, with a line for each as it ends."""
    from scoreboard import line

    PARTS.mkdir(parents=True, exist_ok=True)
    warm_up()
    known = {f: old for f in families if resume and (old := finished(f))}
    todo = [f for f in families if f not in known]
    print(f"{len(families)} families, {len(known)} known from before, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(measure, family, limit, mode): family for family in todo}
        for future in as_completed(running):
            family = running[future]
            known[family] = future.result()
            print(f"[{len(known)}/{len(families)}] {line(family, known[family])}", flush=True)
    return {family: known[family] for family in families}


def committed() -> dict[str, Any]:
    """The families of the committed docs/support.json."""
    shown = subprocess.run(["git", "show", "HEAD:docs/support.json"], cwd=ROOT, capture_output=True, text=True)
    return json.loads(shown.stdout)["families"] if shown.returncode == 0 else {}


def command_line(mode: str) -> str:
    """What wrote the documents, for people."""
    first = "make support" if mode == "full" else "make support ARGS=--quick"
    return first if mode not in PARTIAL else f"{first}, then make support ARGS=--{mode}"


def with_more(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A family's committed results, with the checks that were made now in their places."""
    out = {**before, **{attention: {**before[attention]} for attention in ATTENTIONS}}
    for attention in ATTENTIONS:
        result = now.get(attention, {})
        if result.get("status") == "ran":
            made = {
                name: value for name, value in result.items() if not isinstance(value, dict) or "skipped" not in value
            }
            out[attention] = {**before[attention], **made}
        for name in PARTIAL:
            out[attention].setdefault(name, {"skipped": True})
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (2)")
    parser.add_argument("--only", default="", help="these families, by commas; writes nothing")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted sweep has finished")
    quick = "eviction with eager attention only, graph breaks not counted"
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", dest="mode", action="store_const", const="quick", default="full", help=quick)
    modes.add_argument("--graphs", dest="mode", action="store_const", const="graphs", help="count graph breaks only")
    modes.add_argument("--masks", dest="mode", action="store_const", const="masks", help="look at masks only")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one family (240)")
    options = parser.parse_args()
    from families import FAMILIES
    from scoreboard import document, in_scope, regressions, with_host_styles

    only = [f for f in options.only.split(",") if f]
    unknown = sorted(set(only) - set(FAMILIES))
    if unknown:
        parser.error(f"no such families: {', '.join(unknown)}")
    before = committed()
    chosen = only or (FAMILIES if options.mode not in PARTIAL else [f for f in FAMILIES if in_scope(before[f])])
    results = sweep(chosen, options.jobs, options.limit, options.resume, options.mode)
    if options.mode in PARTIAL:
        results = {f: with_more(old, results.get(f, {})) for f, old in before.items()}
    if not only:
        record = document(results, command=command_line(options.mode))
        for name, text in record.items():
            (ROOT / "docs" / name).write_text(with_host_styles(text, (ROOT / "docs" / name).read_text()))
        print("wrote docs/support.md and docs/support.json")
    worse = regressions(before, results)
    print("\n".join(["worse than the committed docs/support.json:", *worse] if worse else ["nothing got worse"]))
    return 1 if worse else 0


if __name__ == "__main__":
    find_packages()
    sys.exit(main())
