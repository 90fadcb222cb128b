"""Built-in policies in generate on the device: against the CPU (policy_cases.py), and as CUDA graphs (static_cases.py);
a row per policy and file.
"""

from __future__ import annotations

from pathlib import Path

from gpu.device import DEVICE, GPU
from gpu.pytests import run
from gpu.record import Record

if __name__ == "__main__":
    record = Record("policies", DEVICE, whole=GPU)
    run([str(Path(__file__).resolve().parent / f"{name}_cases.py") for name in ("policy", "static")], record)
    record.finish()
