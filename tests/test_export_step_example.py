"""examples/export_step.py runs as it stands, and docs/export.md shows what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_prints_what_the_docs_show(tmp_path: Path):
    pytest.importorskip("torch_mlir")
    command = [sys.executable, "-P", str(ROOT / "examples" / "export_step.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown = (ROOT / "docs" / "export.md").read_text()
    # What holds on any machine: bytes, files and kvpass ops. Choices and torch-mlir's op counts move with versions.
    stable = r"budget [\d.]+|[\d,]+ bytes of K and V, .*|step_\w+\.mlir|\d of kvpass"
    assert re.findall(stable, done.stdout.split("\n\n", 1)[1]) == re.findall(stable, shown.split("It prints")[1])[:12]
    assert len(list(tmp_path.iterdir())) == 4
