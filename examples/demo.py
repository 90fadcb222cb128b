"""`make demo`: SmolLM2 answers a question about a long text, with its full cache and an evicting one.

    python -P examples/demo.py [--policy kvpass] [--budget 0.2] [--inner eager] [--tokens 3000]

The full cache is the unmodified Hugging Face model, run eagerly. Each contender has a process of its own
(demo_worker.py), so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rich.table import Table
from task import FACT, QUESTION
from workers import progress, run_worker, wide_console

import kvpass

HERE = Path(__file__).resolve().parent
DEBUG = HERE.parent / "kvpass_debug" / "demo"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="kvpass", help="a policy's name or a YAML file")
    parser.add_argument("--budget", default="0.2", help="fraction of the tokens that is kept, or slots per KV head")
    parser.add_argument("--inner", default="eager", choices=["eager", "aot_eager", "inductor"])
    parser.add_argument("--tokens", type=int, default=3000, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest answer")
    return parser.parse_args()


def number(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def jobs(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What the two workers are to do; the second is compared with what the first leaves behind."""
    base = {"tokens": args.tokens, "new_tokens": args.new_tokens, "policy": None, "reference": None}
    choice = {"policy": args.policy, "budget": number(args.budget), "inner": args.inner, "debug": str(DEBUG)}
    return [
        {**base, "name": "full cache"},
        {
            **base,
            **choice,
            "name": f"kvpass {Path(args.policy).stem}",
            "reference": str(folder / "full cache.pt"),
        },
    ]


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.1f} MB"


def peak(result: dict[str, Any]) -> str:
    above = result["peak_above_idle"]
    return megabytes(result["peak_bytes"]) + (f"\n({megabytes(above)} above idle)" if above is not None else "")


def rows(full: dict[str, Any], kept: dict[str, Any]) -> list[tuple[str, str, str]]:
    found, share = kept["agreement"], kept["kv_bytes"] / full["kv_bytes"]
    return [
        ("answer", full["answer"], kept["answer"]),
        (
            "KV bytes held at the end",
            megabytes(full["kv_bytes"]),
            f"{megabytes(kept['kv_bytes'])} ({share:.0%})",
        ),
        ("peak memory of the process", peak(full), peak(kept)),
        ("prefill", f"{full['prefill_s']:.2f} s", f"{kept['prefill_s']:.2f} s"),
        ("per token (median)", f"{full['ms_per_token']:.1f} ms", f"{kept['ms_per_token']:.1f} ms"),
        ("capture and compile, once", "-", f"{kept['compile_s']:.1f} s"),
        ("same most likely token", "-", f"{found['top1']:.1%} of {found['tokens']} steps"),
        ("mean KL to the full cache", "-", f"{found['kl']:.4f} nats"),
    ]


def table(full: dict[str, Any], kept: dict[str, Any], name: str) -> Table:
    out = Table(title=f"a prompt of {full['prompt_tokens']:,} tokens", show_lines=True)
    for heading in ("", "full cache (Hugging Face)", f"kvpass {name}"):
        out.add_column(heading, max_width=48)
    for row in rows(full, kept):
        out.add_row(*row)
    return out


def check(args: argparse.Namespace) -> None:
    """Ends the demo before any work if the policy is wrong."""
    try:
        kvpass.Policy.load(args.policy).with_budget(number(args.budget))
    except kvpass.KVPassError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def main() -> None:
    args, started, console = arguments(), time.perf_counter(), wide_console()
    check(args)
    with tempfile.TemporaryDirectory(prefix="kvpass-demo-") as scratch, progress(console) as shown:
        folder = Path(scratch)
        full, kept = (run_worker(HERE / "demo_worker.py", job, folder, shown) for job in jobs(args, folder))
    console.print(f"hidden in the text: {FACT}", f"asked at its end: {QUESTION}", sep="\n", highlight=False)
    console.print(table(full, kept, f"{args.policy}, budget {args.budget}, inner {args.inner}"))
    console.print("Times are of two runs, one after the other; make bench interleaves them.")
    console.print("The two last rows follow the full cache's answer token by token (teacher forcing).")
    console.print(f"debug report: {DEBUG / 'index.html'}", soft_wrap=True, highlight=False)
    console.print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
