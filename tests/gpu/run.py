"""Runs the stages one after the other, each in a process of its own with a time limit. Started by run.sh.

    python -P -m gpu.run [--only environment,cases] [--seconds 480]

A stage that fails, or that is ended at its limit, is recorded and the next one runs. $OUT then holds <stage>.json of
each, what they printed (log.txt) and summary.json. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu.record import ENDS, read, write

PASSED, FAILED, ENDED, NO_TIME = "passed", "failed", "ended at its limit", "no time left"
SECONDS = 480


@dataclass(frozen=True)
class Stage:
    """A module `gpu.<name>` unless a command is given; `share` of the whole time is its own, as is what the stages
    before it left.
    """

    name: str
    share: float
    command: tuple[str, ...] = ()

    def started(self) -> list[str]:
        return list(self.command) or [sys.executable, "-P", "-m", f"gpu.{self.name}"]


STAGES = (
    Stage("environment", 0.06),
    Stage("cases", 0.18),
    Stage("policies", 0.18),
    Stage("kernels", 0.12),
    Stage("end_to_end", 0.34),
    Stage("sanitizer", 0.12),
)


def run(stage: Stage, limit: float, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One stage; completes its JSON. Returns the row of the summary."""
    path, start = out / f"{stage.name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    status, code = NO_TIME, None
    if limit > 0:
        code = execute(stage, limit, out, environment)
        status = ENDED if code is None else FAILED if code or not path.exists() else PASSED
    row = {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(limit)}
    found = read(path) if path.exists() else {"stage": stage.name, "rows": []}
    write(path, found | row | {"exit": code})
    return row | {"rows": len(found["rows"]), "errors": sum("error" in entry for entry in found["rows"])}


def execute(stage: Stage, limit: float, out: Path, environment: dict[str, str]) -> int | None:
    """The exit status; None if the stage was ended, with all that it had started."""
    environment = environment | {"OUT": str(out), ENDS: str(time.time() + limit)}
    with (out / "log.txt").open("a") as log:
        print(f"== {stage.name}", file=log, flush=True)
        process = subprocess.Popen(
            stage.started(), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_all(stages: Sequence[Stage], out: Path, seconds: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """All stages within `seconds` in all. Prints a line for each, writes summary.json after each."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").unlink(missing_ok=True)
    start, granted, rows = time.monotonic(), 0.0, []
    for stage in stages:
        granted += stage.share * seconds
        print(f"{stage.name} ...", flush=True)
        rows.append(run(stage, start + granted - time.monotonic(), out, environment))
        summary = {"date": datetime.now(UTC).strftime("%F"), "command": "tests/gpu/run.sh", "stages": rows}
        write(out / "summary.json", summary | {"passed": all(row["status"] == PASSED for row in rows)})
    print(table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'stage':<14}{'status':<20}{'rows':>6}{'errors':>8}{'seconds':>9}{'limit':>7}"]
    lines += ["{stage:<14}{status:<20}{rows:>6}{errors:>8}{seconds:>9.1f}{limit:>7}".format(**row) for row in rows]
    return "\n".join(lines)


def settings() -> dict[str, str]:
    """The stages' environment. TRITON_INTERPRET must be what it is before a kernel is imported."""
    import torch

    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if torch.cuda.is_available():
        return environment
    print("no GPU here: small shapes in Triton's interpreter; what is measured means nothing")
    return environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stages, with commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",") if args.only else [stage.name for stage in STAGES]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = Path(os.environ["OUT"])
    rows = run_all([stage for stage in STAGES if stage.name in wanted], out, args.seconds, settings())
    print(f"written to {out}")
    return 0 if all(row["status"] == PASSED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
