"""The kernels' cases (tests/kernels/triton_cases_*.py) on the device, against the references on the CPU."""

from __future__ import annotations

from pathlib import Path

import interpreted
from gpu.device import DEVICE, GPU
from gpu.pytests import run
from gpu.record import Record

FOLDER = Path(interpreted.__file__).parent
FEW = {
    "prefill": ["test_prefill_shapes[True-single]", "test_select[random-37]", "test_compact[streaming-pos]"],
    "decode": ["test_decode_groups[h2o-1]"],
    "codes": ["test_sinks_and_softcap"],
}
"""In the interpreter one of a kind: test_triton_interpreter.py runs them all."""


def chosen() -> list[str]:
    files = {name: FOLDER / f"triton_cases_{name}.py" for name in FEW}
    return [str(f) for f in files.values()] if GPU else [f"{files[name]}::{case}" for name in FEW for case in FEW[name]]


if __name__ == "__main__":
    record = Record("cases", DEVICE, whole=GPU)
    run(chosen(), record)
    record.finish()
