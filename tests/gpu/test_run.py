"""tests/gpu/run.sh on a CPU: every stage leaves right JSON; one that fails or overruns is recorded, the rest runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu import page
from gpu.run import ENDED, FAILED, NO_TIME, PASSED, STAGES, Stage, run_all

HERE = Path(__file__).resolve().parent
WRITES = """
import json, os, pathlib
pathlib.Path(os.environ["OUT"], "{name}.json").write_text(json.dumps({{"rows": [{{"n": 1}}]}}))
"""


def python(name: str, then: str, share: float = 1.0) -> Stage:
    """A stage that writes its JSON and goes on with `then`."""
    return Stage(name, share, (sys.executable, "-c", WRITES.format(name=name) + then))


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_on_a_cpu(tmp_path: Path) -> None:
    """The script, started as on a machine of which nothing is known but its Python. It takes a minute; a busy machine
    may take an hour. One test, so that no two workers run it.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable}
    out = tmp_path / "out"
    command = [str(HERE / "run.sh"), "--seconds", "3600"]
    done = subprocess.run(command, env=environment | {"OUT": str(out)}, cwd=tmp_path, capture_output=True, text=True)
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else done.stderr
    assert done.returncode == 0, done.stdout + log[-6000:]
    for check in (check_stages, check_environment, check_cases, check_tables, check_page):
        check(out)


def check_stages(out: Path) -> None:
    """Each passed, and says of its figures that they mean nothing."""
    summary = read(out, "summary")
    assert [row["stage"] for row in summary["stages"]] == [stage.name for stage in STAGES]
    assert summary["passed"]
    for stage in STAGES:
        found = read(out, stage.name)
        assert found["status"] == PASSED
        assert found["device"] == "cpu"
        assert "mean nothing" in found["figures"]
        assert not [row for row in found["rows"] if "error" in row]
    assert len(list(out.glob("*.*"))) == len(STAGES) + 2  # 8 files come back from the machine that is lent


def check_environment(out: Path) -> None:
    found = read(out, "environment")
    assert {"commit", "python", "torch", "transformers", "triton", "kvpass"} <= set(found["facts"])
    assert found["rows"][0]["gb_per_s"] > 0
    assert found["rows"][1]["tflop_per_s"] > 0


def check_cases(out: Path) -> None:
    """A case of each op, run by pytest against the references."""
    cases = " ".join(row["case"] for row in read(out, "cases")["rows"])
    for op in ("prefill", "select", "compact", "decode"):
        assert f"test_{op}" in cases
    cases = [row["case"] for row in read(out, "policies")["rows"]]
    assert cases == ["policy_cases.py::test_policy[h2o]", "static_cases.py::test_recorded[h2o]"]


def check_tables(out: Path) -> None:
    kernels, models = read(out, "kernels")["rows"], read(out, "end_to_end")["rows"]
    assert {row["kernel"] for row in kernels} == {"prefill", "provider", "decode", "select", "compact"}
    assert all(row["ms"] > 0 for row in kernels)
    assert all(row["difference"] < 1e-5 for row in kernels if "difference" in row)
    figures = {row["contender"]: row for row in models}
    full, dynamic = figures["kvpass full, eager"], figures["HF dynamic, eager"]
    assert full["same_tokens"] == 1.0
    assert dynamic["kv_bytes"] <= full["kv_bytes"] <= 1.1 * dynamic["kv_bytes"]
    assert all(math.isfinite(row["step_ms"]) and math.isfinite(row["prefill_ms"]) for row in models)
    assert all("not_run" in row for row in read(out, "sanitizer")["rows"])


def check_page(out: Path) -> None:
    """The page has each figure, and the command that writes docs/gpu.md refuses those of a CPU."""
    text = page.page(out)
    for row in [*read(out, "kernels")["rows"], *read(out, "end_to_end")["rows"]]:
        assert f"| {row.get('contender', row.get('what'))} |" in text or row["kernel"] in text
    assert read(out, "environment")["facts"]["torch"] in text
    before = (page.ROOT / "docs" / "gpu.md").read_text()
    with pytest.raises(SystemExit, match="no figures of a GPU"):
        page.main([str(out)])
    assert (page.ROOT / "docs" / "gpu.md").read_text() == before


def test_page_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU's run does not have: graphs, peaks, errors, contenders that were left out, a stage that was ended."""
    step = {"kernel": "decode", "batch": 1, "slots": 8192, "what": "kvpass h2o", "ms": 0.193, "gb_per_s": 174.0}
    wrong = {"kernel": "prefill", "batch": 1, "tokens": 2048, "what": "torch, cudnn", "error": "RuntimeError: none"}
    model = {"batch": 8, "tokens": 4096, "contender": "kvpass full, eager", "prefill_ms": 339.0, "peak_bytes": 2**30}
    rows = {
        "cases": [{"case": "a"}, {"case": "b", "error": "failed: x"}],
        "kernels": [step | {"replayed": {"ms": 0.026, "gb_per_s": 1313.0}}, wrong],
        "end_to_end": [
            model,
            {"batch": 8, "tokens": 4096, "contender": "kvpass full, inductor", "left_out": "no time"},
        ],
        "sanitizer": [{"tool": "memcheck", "cases": 9, "found": 0}],
    }
    for name, entries in rows.items():
        found = {"stage": name, "device": "cuda", "status": ENDED, "seconds": 9.0, "shape": {}, "model": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(found | {"rows": entries}))
    summary = {"date": "2026-12-01", "command": "tests/gpu/run.sh", "stages": [{"stage": name} for name in rows]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main([str(tmp_path)])
    text = (tmp_path / "docs" / "gpu.md").read_text()
    for line in (
        "| 1 | 8,192 | kvpass h2o | 193 | 174 | 26.0 | 1,313 |",
        "| 1 | 2,048 | torch, cudnn | error | error |",
        "| kvpass full, eager | 339 | - | - | 1,024 | - | - |",
        "| kvpass full, inductor (no time) | - | - | - | - | - | - |",
        f"1 of 2 right; {ENDED} after 9 s",
        "memcheck: nothing found in 9 cases",
        '"error": "failed: x"',
    ):
        assert line in text, line


def test_failing_stages(tmp_path: Path) -> None:
    """One that fails and one that writes nothing: the next runs."""
    silent = Stage("silent", 1.0, (sys.executable, "-c", ""))
    rows = run_all(
        [python("broken", "raise SystemExit(3)"), silent, python("last", "")], tmp_path, 60, dict(os.environ)
    )
    assert [row["status"] for row in rows] == [FAILED, FAILED, PASSED]
    assert [read(tmp_path, name)["status"] for name in ("broken", "silent", "last")] == [FAILED, FAILED, PASSED]
    assert read(tmp_path, "broken")["exit"] == 3
    assert not read(tmp_path, "summary")["passed"]


def test_overrunning_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is ended with the child that it waits for; what it had written stays; the next runs."""
    child = f"import subprocess\nsubprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"
    start = time.monotonic()
    rows = run_all([python("slow", child, 0.1), python("last", "", 0.9)], tmp_path, 100, dict(os.environ))
    assert time.monotonic() - start < 60
    assert [row["status"] for row in rows] == [ENDED, PASSED]
    assert read(tmp_path, "slow")["rows"] == [{"n": 1}]
    assert ENDED in capsys.readouterr().out


def test_exit_status(tmp_path: Path) -> None:
    """A second is too little for any stage."""
    environment = dict(os.environ) | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [str(HERE / "run.sh"), "--only", "environment,sanitizer", "--seconds", "1"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 1
    assert {row["status"] for row in read(tmp_path, "summary")["stages"]} <= {ENDED, NO_TIME}


def test_no_time(tmp_path: Path) -> None:
    (row,) = run_all([python("late", "", 0)], tmp_path, 1, dict(os.environ))
    assert row["status"] == NO_TIME
    assert read(tmp_path, "late")["rows"] == []
