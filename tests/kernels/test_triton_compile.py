"""Every Triton kernel compiles for NVIDIA and AMD targets without a GPU, within shared memory and without spilling."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

import torch
import triton
from kvpass.kernels import compile_report
from kvpass.kernels.compile_report import CASES, SHARED_LIMIT, TARGETS, Case

PINNED_WITH = (3, 9)
"""The triton that the block sizes were chosen with; its compiler spills nothing on sm_90."""


def spill_limit(case: Case, target: str) -> int:
    """Bytes (NVIDIA) or vector registers and bytes (AMD) that may spill. float32 heads of 256 always spill some, capped
    ones a little.
    """
    if case.dtype == torch.float32 and case.dim > 128:
        return 512
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    wide_and_capped = case.softcap > 0.0 and case.dim > 128
    return 0 if target == "sm_90" and version == PINNED_WITH and not wide_and_capped else 64


def often(at: int, target: str) -> bool:
    """In CI every case on sm_90, and on each other target every second one."""
    return target == "sm_90" or (at + [*TARGETS].index(target)) % 2 == 0


PAIRS = [
    pytest.param(case, target, marks=[] if often(at, target) else pytest.mark.wide, id=f"{case.name}-{target}")
    for at, case in enumerate(CASES)
    for target in TARGETS
]


@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_compiles(case: Case, target: str) -> None:
    """With -s, prints registers, shared memory and spills."""
    rows = compile_report.measure(case, target)
    print("\n" + compile_report.table(rows))
    for row in rows:
        assert row.shared <= SHARED_LIMIT[target], row
        assert row.spills <= spill_limit(case, target), row


def test_every_kernel_is_compiled() -> None:
    """A kernel that no case launches would go unnoticed."""
    root = Path(compile_report.__file__).parent
    sources = "".join(p.read_text(encoding="utf-8") for p in root.rglob("triton_*.py"))
    written = set(re.findall(r"^def (\w+_kernel)\(", sources, re.M))
    launched = {
        launch.kernel.__name__ for case in CASES for launch in compile_report.launches(case, TARGETS["sm_90"][0])
    }
    assert launched == written


def test_do_not_specialize() -> None:
    """Lengths that grow with every token never make a new variant of a decode kernel."""
    for launch in compile_report.launches(CASES[0], TARGETS["sm_90"][0]):
        loose = {p.name for p in launch.kernel.params if p.do_not_specialize}
        names = {p.name for p in launch.kernel.params}
        assert names & {"position", "C", "L", "S", "capacity", "s_mb", "s_mh"} <= loose, launch.kernel.__name__
