"""Runs triton_cases_*.py, each group in a process of its own that has TRITON_INTERPRET=1 from the start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
HERE = Path(__file__).parent
GROUPS = [
    ("prefill", "test_prefill_words"),
    ("prefill", "test_prefill and not test_prefill_words"),
    ("prefill", "not test_prefill"),
    ("decode", "test_pipeline or ragged"),
    ("decode", "test_policy or test_words or left_padding"),
    ("decode", "test_decode and not ragged"),
    ("codes", "test_store or test_widths"),
    ("codes", "not test_store and not test_widths"),
]


@pytest.mark.parametrize(("file", "chosen"), GROUPS)
def test_interpreter(file: str, chosen: str) -> None:
    """Every case of the group passes, none is skipped; with -s the cases are listed."""
    run(file, chosen)


@pytest.mark.wide
@pytest.mark.parametrize("file", ["prefill", "decode", "codes"])
def test_all_cases(file: str) -> None:
    """Those of `make wide` too; each sum and product of integers is compared with int64's."""
    run(file, "test_", "-m", "", KVPASS_SANITIZE_OVERFLOW="1")


def run(file: str, chosen: str, *options: str, **variables: str) -> None:
    file = str(HERE / f"triton_cases_{file}.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", file]
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= variables
    done = subprocess.run([*command, "-k", chosen, *options], env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout
