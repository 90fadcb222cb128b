"""`make bench`: the suite. One command measures, checks and prints all tables, and PASS or the distance for each aim.

    python -P examples/bench/run.py [--only decode,op] [--kvpress /tmp/kvpress/bin/python] [--quick] [--list]

Each benchmark is a file in benchmarks/, each of its jobs a process of its own. What is measured is kept in
.cache/bench: a run that was stopped goes on where it was, and a later run of the same commit measures what is missing
(--fresh: all).
Where a GPU is, each benchmark is measured there too. Writes a table (Markdown), the figures (JSON) and a picture (PNG)
to examples/bench/results/<date>-<machine>.*, and the figures of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from workers import progress, watched, wide_console

from bench import machine, report
from bench.suite import BENCHMARKS, Job, Options, module_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = ROOT / ".cache" / "bench"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="benchmarks whose names begin so, with commas")
    parser.add_argument("--contenders", default="", help="only contenders whose name has this in it")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; 0: each benchmark's own")
    parser.add_argument("--kvpress", default="", help="python of an environment with kvpress (tests/kvpress/README.md)")
    parser.add_argument("--llama", default="", help="python of an environment with llama-cpp-python")
    parser.add_argument("--device", default="", help="cpu or cuda; both where both are")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run at all?")
    parser.add_argument("--long", action="store_true", help="also bfloat16, more policies, more inner compilers")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is kept of this commit")
    parser.add_argument("--list", action="store_true", help="what there is, and how long it takes")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    return parser.parse_args()


def chosen(only: str) -> list[str]:
    """Names of benchmarks, in order. SystemExit for a beginning that none has."""
    wanted = [name for name in only.split(",") if name]
    unknown = [name for name in wanted if not any(one.startswith(name) for one in BENCHMARKS)]
    if unknown:
        raise SystemExit(f"no benchmark begins with {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    return [name for name in BENCHMARKS if not wanted or any(name.startswith(one) for one in wanted)]


CODE = ("kvpass", "kernels", "patterns", "examples", ":!examples/bench/results")
"""What a result depends on, beside the job."""


@functools.cache
def commit() -> str:
    """The commit that is checked out, `+` and a digest of what was changed since; "" outside of git."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True).stdout

    changed = git("diff", "HEAD", "--", *CODE)
    head = git("rev-parse", "--short=12", "HEAD").decode().strip()
    return head + (f"+{hashlib.sha256(changed).hexdigest()[:8]}" if changed else "")


def kept_at(job: Job) -> Path:
    """Where a job's result is kept: another job, or another commit, has another place."""
    digest = hashlib.sha256(json.dumps([job, commit()], sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in f"{job['benchmark']}-{job['name']}-{job['device']}")
    return PARTS / f"{name}-{digest}.json"


def measured(job: Job, fresh: bool, shown: Any) -> dict[str, Any]:
    """A job's result: kept, or measured in a process of its own. SystemExit, with its words, if that fails."""
    path = kept_at(job)
    if fresh:
        path.unlink(missing_ok=True)
    title = f"{job['benchmark']}, {job['name']}, {job['device']}"
    task = shown.add_task(title, total=None, doing="kept" if path.exists() else "starting")
    if not path.exists():
        PARTS.mkdir(parents=True, exist_ok=True)
        _work(job, path, title, task, shown)
    shown.update(task, doing="done", total=1, completed=1)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _work(job: Job, path: Path, title: str, task: Any, shown: Any) -> None:
    command = [sys.executable, "-P", str(HERE / "worker.py"), json.dumps(job), str(path)]
    watched(command, title, shown, task, ROOT)


def devices(asked: str) -> list[str]:
    """Where to measure. SystemExit for a GPU that is not there."""
    gpu = torch.cuda.is_available()
    if asked.startswith("cuda") and not gpu:
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    return [asked] if asked else ["cpu", *(["cuda"] if gpu else [])]


def main() -> None:
    args, started, console = arguments(), time.perf_counter(), wide_console()
    names = chosen(args.only)
    if args.list:
        for name in names:
            module = module_of(name)
            console.print(f"{name} ({module.MINUTES} min): {(module.__doc__ or '').splitlines()[0]}", highlight=False)
        return
    results: dict[str, Any] = {"benchmarks": {}}
    with progress(console) as shown:
        for device in devices(args.device):
            options = Options(args.quick, args.long, device, args.kvpress, args.llama, args.rounds, args.contenders)
            for name in names:
                jobs = [{"benchmark": name, "device": device, **job} for job in module_of(name).jobs(options)]
                done = {job["name"]: measured(job, args.fresh, shown) for job in json.loads(json.dumps(jobs))}
                if done:
                    results["benchmarks"].setdefault(name, {})[device] = done
    results |= {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-P", "examples/bench/run.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine.describe(),
        "quick": args.quick,
        "took_s": time.perf_counter() - started,
    }
    report.show(results, console)
    name = f"{results['date']}-{machine.slug(results['machine'])}" + ("-quick" if args.quick else "")
    for path in report.write(results, args.out, name, whole=names == list(BENCHMARKS) and not args.quick):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
