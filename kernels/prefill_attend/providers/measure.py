"""Measures the providers of attention on this machine's device and writes what they take to the table.

`make providers`, or `python -P -m kvpass.kernels.prefill_attend.providers.measure`. On a CPU only torch's kernel for
CPUs is measured: no choice hangs on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.prefill_attend.providers.call import Call, facts_of
from kvpass.kernels.prefill_attend.providers.choose import NAMES, TABLE, load
from kvpass.kernels.triton_shared.triton_launch import target

REPEATS = 9
KEY = ("device", "arch", "dtype", "dim", "queries")
"""What makes a row of the table another."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write: new rows take the place of those of the same device and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--queries", default="1024,2048,8192,32768" if gpu else "512")
    parser.add_argument("--dims", default="64,128,256" if gpu else "64")
    parser.add_argument("--dtypes", default="bfloat16,float16" if gpu else "float32")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--to", type=Path, default=TABLE)
    args = parser.parse_args(arguments)
    rows = []
    for dtype in args.dtypes.split(","):
        for dim in map(int, args.dims.split(",")):
            for queries in map(int, args.queries.split(",")):
                rows.append(measured(dtype, dim, queries, (args.heads, args.kv_heads), "cuda" if gpu else "cpu"))
                print(json.dumps(rows[-1]), flush=True)
    write(rows, args.to)


def measured(dtype: str, dim: int, queries: int, heads: tuple[int, int], device: str) -> dict[str, Any]:
    """The row of one shape: milliseconds of a causal call of one sequence, by provider."""
    sizes = ((heads[0], dim), (heads[1], dim), (heads[1], dim))
    q, k, v = (torch.randn(1, queries, h, d, device=device).to(getattr(torch, dtype)).transpose(1, 2) for h, d in sizes)
    call = Call(q, k, v, None, Shown(Sees(causal=True), queries), Softmax(dim**-0.5))
    on = target(q.device)
    facts = facts_of(call, on.kind, on.arch)
    names = [name for name in NAMES if (device != "cpu" or name != "triton") and load(name).supports(facts)]
    ms = {name: _median_ms(load(name), call) for name in names if load(name).enabled()}
    named = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": named, "arch": on.arch, "dtype": dtype, "dim": dim, "queries": queries, "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%F"), "ms": ms,
    }  # fmt: skip


def _median_ms(provider: Any, call: Call) -> float:
    """Milliseconds of a call that is warm: by the device's clock on a GPU, some calls between two events."""
    provider.attend(call)
    if call.q.device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            provider.attend(call)
            times.append(time.perf_counter() - start)
        return float(round(1e3 * statistics.median(times), 4))
    found = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            provider.attend(call)
        end.record()
        torch.cuda.synchronize()
        found.append(float(begin.elapsed_time(end)) / 3)
    return round(statistics.median(found), 4)


def write(rows: list[dict[str, Any]], to: Path) -> None:
    """Join rows to those of a table, one a line."""
    old = json.loads(to.read_text(encoding="utf-8")) if to.exists() else {"about": "", "rows": []}
    joined = {tuple(row[name] for name in KEY): row for row in [*old["rows"], *rows]}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in joined.values())
    about = json.dumps(old["about"] or "Milliseconds of one causal call of one sequence, by make providers.")
    to.write_text(f'{{\n  "about": {about},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    print(f"written to {to}")


if __name__ == "__main__":
    main()
