"""`make demo`: SmolLM2 answers a question about a few thousand tokens of text, with its full cache and with an evicting one.

    python -P examples/demo.py [--policy snapkv] [--budget 0.2] [--inner eager] [--tokens 3000] [--new-tokens 64]

The full cache is the unmodified Hugging Face model, run eagerly. Each contender has a process of its own (demo_worker.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
DEBUG = HERE.parent / "kvpass_debug" / "demo"
FULL = "full cache (Hugging Face)"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="snapkv", help="a policy's name or a YAML file")
    parser.add_argument("--budget", default="0.2", help="fraction of the tokens that each KV head keeps, or slots")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    parser.add_argument("--tokens", type=int, default=3000, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest answer")
    return parser.parse_args()


def number(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def run_worker(job: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Runs one contender and shows what it says it is doing; its figures."""
    task = progress.add_task(job["name"], total=None, doing="starting")
    command = [sys.executable, "-P", str(HERE / "demo_worker.py"), json.dumps(job), str(folder)]
    with (folder / "stderr.txt").open("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        last = ""
        for line in worker.stdout or ():
            last = line.strip() or last
            progress.update(task, doing=last)
        if worker.wait() != 0:
            errors.seek(0)
            progress.stop()
            print(errors.read(), file=sys.stderr)
            raise SystemExit(f"demo: '{job['name']}' failed while {last or 'starting'} (its own words are above)")
    progress.update(task, doing="done", total=1, completed=1)
    return json.loads((folder / f"{job['name']}.json").read_text())


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.1f} MB"


def share(part: float, whole: float) -> str:
    return f" ({part / whole:.0%})"


def peak(result: dict[str, Any]) -> str:
    above = result["peak_above_idle"]
    return megabytes(result["peak_bytes"]) + (f", {megabytes(above)} above idle" if above is not None else "")


def agreement_cells(result: dict[str, Any]) -> tuple[str, str]:
    found = result["agreement"]
    return (
        f"{found['top1']:.1%} over {found['tokens']} tokens",
        f"{found['kl']:.4f} nats",
    )


def table(full: dict[str, Any], kept: dict[str, Any], name: str) -> Table:
    out = Table(title=f"a prompt of {full['prompt_tokens']:,} tokens", show_lines=True)
    out.add_column("", style="bold", max_width=26)
    out.add_column(FULL, max_width=48)
    out.add_column(f"kvpass {name}", max_width=48)
    top1, kl = agreement_cells(kept)
    ratio = share(kept["kv_bytes"], full["kv_bytes"])
    rows = [
        ("answer", full["answer"], kept["answer"]),
        ("KV bytes held at the end", megabytes(full["kv_bytes"]), megabytes(kept["kv_bytes"]) + ratio),
        ("peak memory of the process", peak(full), peak(kept)),
        ("prefill", f"{full['prefill_s']:.2f} s", f"{kept['prefill_s']:.2f} s"),
        ("per token (median)", f"{full['ms_per_token']:.1f} ms", f"{kept['ms_per_token']:.1f} ms"),
        ("capture and compile, once", "-", f"{kept['compile_s']:.1f} s"),
        ("same most likely token", "-", top1),
        ("mean KL to the full cache", "-", kl),
    ]
    for row in rows:
        out.add_row(*row)
    return out


def main() -> None:
    args, started = arguments(), time.perf_counter()
    console = Console()
    base = {"tokens": args.tokens, "new_tokens": args.new_tokens}
    full_job = {**base, "name": "full", "policy": None, "reference": None}
    name = f"{args.policy}, budget {args.budget}, inner {args.inner}"
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.fields[doing]}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="kvpass-demo-") as scratch, Progress(*columns, console=console) as progress:
        folder = Path(scratch)
        full = run_worker(full_job, folder, progress)
        choice = {"policy": args.policy, "budget": number(args.budget), "inner": args.inner, "debug": str(DEBUG)}
        kept_job = {**base, **choice, "name": "kvpass", "reference": str(folder / "full.pt")}
        kept = run_worker(kept_job, folder, progress)
    console.print("hidden in the text: ", "[bold]The access code of the vault is 48213. Remember it.[/]")
    console.print("asked at its end:   ", "[bold]What is the access code of the vault? Then explain ...[/]")
    console.print(table(full, kept, name))
    console.print("The distributions are compared over the full cache's own answer, token by token (teacher forcing).")
    console.print(f"debug report: {DEBUG / 'index.html'}", soft_wrap=True)
    console.print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
