"""What this machine is, and its two ceilings: a large copy and a large bf16 matrix product."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from bench.machine import describe
from gpu.device import DEVICE, GPU, median_ms
from gpu.record import Record

import kvpass

ROOT = Path(kvpass.__file__).resolve().parent.parent
COPIED = 2**32 if GPU else 2**22
"""Bytes."""
SIDE = 8192 if GPU else 128


def output_of(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """From git; in a copy without history, or with an older one, from what prepare.sh noted."""
    noted = ROOT / ".gpu" / "wheels" / "commit"
    known = output_of("git", "describe", "--always", "--abbrev=40", "--dirty")
    if known and not known.endswith("-dirty"):
        return known
    return noted.read_text().strip() if noted.exists() else known or "unknown"


def hardware() -> dict[str, Any]:
    if not GPU:
        return {}
    seen = torch.cuda.get_device_properties(0)
    return {
        "gpu": seen.name,
        "compute capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory": f"{seen.total_memory / 2**30:.0f} GiB",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda of torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def copied() -> dict[str, Any]:
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * COPIED / median_ms(lambda: target.copy_(source)) / 1e6}


def multiplied() -> dict[str, Any]:
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return {"tflop_per_s": 2 * SIDE**3 / median_ms(lambda: a @ b) / 1e9}


def main() -> None:
    facts = {"commit": commit(), **describe(), "kvpass": kvpass.__version__, **hardware()}
    record = Record("environment", DEVICE, facts=facts)
    record.attempt({"what": "copy, bytes read and written"}, copied)
    record.attempt({"what": f"matrix product bf16, {SIDE} x {SIDE} x {SIDE}"}, multiplied)
    record.finish()


if __name__ == "__main__":
    main()
