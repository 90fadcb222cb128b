"""`make bench`: SmolLM2 decoded by Hugging Face's caches and by kvpass', contenders interleaved.

    python -P examples/bench/run.py [--cases 1024x1,4096x1,2048x8] [--rounds 30] [--only eager] [--quick] [--scan]
    python -P examples/bench/run.py --first-token [--quick]

Writes a table (Markdown), the figures (JSON) and a picture (PNG) to examples/bench/results/<date>-<machine>.*
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workers import progress, run_worker, wide_console

from bench import first_token, machine, report, scan
from bench.contenders import SPECS

HERE = Path(__file__).resolve().parent

# Prefill of a large batch takes most of a minute per contender, so it is timed once, and with inductor
# only in the call that compiles (less its compile time, which Dynamo tells).
FEW_PREFILLS_FROM = 8192  # tokens in a batch
IMPORT = """
import time, torch
start = time.perf_counter()
import kvpass
for name in kvpass.__all__:
    getattr(kvpass, name)  # the public names are resolved on first use: count that too
print(time.perf_counter() - start)
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1024x1,4096x1,2048x8", help="context x batch, with commas")
    parser.add_argument("--rounds", type=int, default=30, help="timed decode steps of each contender")
    parser.add_argument("--only", default="", help="only contenders whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: does it run at all?")
    parser.add_argument("--scan", action="store_true", help="only: how long the scan of 100 layers takes")
    parser.add_argument("--first-token", action="store_true", help="only: seconds to the first token, cold and warm")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    args = parser.parse_args()
    if args.quick:
        args.cases, args.rounds = "512x1", 8
    return args


def job_of(case: str, args: argparse.Namespace) -> dict[str, Any]:
    context, batch = (int(part) for part in case.split("x"))
    few = context * batch >= FEW_PREFILLS_FROM or args.quick
    return {
        "name": case,
        "context": context,
        "batch": batch,
        "rounds": args.rounds,
        "prefills": 1 if few else 2,
        "inductor_prefills": 0 if few else 2,
        "contenders": [spec.to_dict() for spec in SPECS if args.only in spec.name],
    }


def import_seconds(repeats: int = 5) -> float:
    """What `import kvpass` costs in a new process that has imported torch: the median."""
    command = [sys.executable, "-P", "-c", IMPORT]
    outs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return statistics.median(float(out.stdout) for out in outs)


def main() -> None:
    args, started, console = arguments(), time.perf_counter(), wide_console()
    if args.scan:
        scan.main(args.out)
        return
    if args.first_token:
        first_token.main(args.out, args.quick)
        return
    with tempfile.TemporaryDirectory(prefix="kvpass-bench-") as scratch, progress(console) as shown:
        importing = import_seconds()
        jobs = [job_of(case, args) for case in args.cases.split(",")]
        cases = [run_worker(HERE / "case.py", job, Path(scratch), shown) for job in jobs]
    results = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-P", "examples/bench/run.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "import_s": importing,
        "cases": cases,
        "took_s": time.perf_counter() - started,
    }
    report.finish(results)
    report.show(results, console)
    name = f"{results['date']}-{machine.slug(results['machine'])}" + ("-quick" if args.quick else "")
    for path in report.write(results, args.out, name):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
