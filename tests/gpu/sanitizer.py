"""compute-sanitizer over a few kernel cases: reads and writes out of bounds (memcheck), races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

from gpu.cases import FOLDER
from gpu.device import DEVICE, GPU
from gpu.record import Record, left

PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
CASES = {
    "prefill": (
        *("test_extend[h2o-left]", "test_extend[snapkv-holes]", "test_extend[roco-heads]"),
        *("test_compact[streaming-pos]", "test_compact[h2o-no pos]", "test_compact[roco-pos]"),
    ),
    "decode": ("test_pipeline[h2o-left]", "test_pipeline[snapkv-none]", "test_pipeline[roco-left]"),
    "codes": ("test_store[int3-pads]", "test_store[fp8-pads]", "test_widths[24-40-7]"),
}
SUMMARY = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
REFUSED, TIMED_OUT = "Device not supported", 124


def tool() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *PLACES]))


def check(command: str, kind: str, seconds: float) -> dict[str, Any]:
    """Raises AssertionError if the tool finds something, or if a case fails under it."""
    chosen = [f"{FOLDER}/triton_cases_{file}.py::{case}" for file, cases in CASES.items() for case in cases]
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        ["timeout", "-k", "5", f"{seconds:.0f}", command, "--tool", kind, "--target-processes", "all", *pytest],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else torch's pool hides what is out of bounds
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-6000:], flush=True)
    if REFUSED in done.stdout:
        return {"not_run": f"{kind}: {REFUSED}"}
    assert done.returncode != TIMED_OUT, f"not done after {seconds:.0f} s"
    assert re.search(rf"\b{len(chosen)} passed", done.stdout), f"not all cases passed: {done.stdout[-400:]}"
    found = [int(n) for n in re.findall(SUMMARY[kind], done.stdout)]
    assert found, f"no summary: {done.stdout[-400:]}"
    assert not any(found), f"{max(found)} found: {done.stdout[-400:]}"
    return {"cases": len(chosen), "found": 0}


def main() -> None:
    command = tool()
    record = Record("sanitizer", DEVICE, tool=command)
    for number, kind in enumerate(SUMMARY):
        row = {"tool": kind}
        if command is None or not GPU:
            record.add(row | {"not_run": "there is no GPU" if not GPU else "compute-sanitizer is not on this machine"})
            continue
        record.attempt(row, lambda k=kind, n=number: check(command, k, (left() - 10) / (len(SUMMARY) - n)))
    record.finish()


if __name__ == "__main__":
    main()
