"""The benchmark suite: what it counts, how it judges, what it keeps. To run it is wide: `--quick` of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import report, run
from bench.counted import Counting, Touched
from bench.op_calls import calls_of_a_step, expected
from bench.suite import BENCHMARKS, Aim, Options, module_of
from models import tiny

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_is_registered() -> None:
    files = {file.stem for file in (ROOT / "examples/bench/benchmarks").glob("*.py")} - {"__init__"}
    assert files == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_jobs_are_plain_data_with_names(name: str) -> None:
    module = module_of(name)
    assert module.__doc__
    for options in (Options(), Options(quick=True), Options(long=True, kvpress="/x/python", llama="/y/python")):
        jobs = module.jobs(options)
        assert json.loads(json.dumps(jobs)) == jobs
        assert len({job["name"] for job in jobs}) == len(jobs) > 0
    assert isinstance(module.jobs(Options(device="cuda")), list)


@pytest.mark.parametrize(
    ("value", "aim", "least", "verdict"),
    [
        (3.5, 3.5, True, "PASS"),
        (2.0, 3.5, True, "1.75x away"),
        (1.1, 1.2, False, "PASS"),
        (1.5, 1.2, False, "1.25x away"),
        (2, 0, False, "2 above"),
        (0, 0, False, "PASS"),
        (1.0, None, True, "-"),
    ],
)
def test_verdicts(value: float, aim: float | None, least: bool, verdict: str) -> None:
    assert Aim("a", value, aim, least).verdict == verdict


def test_what_is_kept_is_of_a_job_and_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"benchmark": "decode", "name": "1x1", "device": "cpu", "rounds": 3}
    here = run.kept_at(job)
    assert run.kept_at(dict(reversed(job.items()))) == here
    assert run.kept_at({**job, "rounds": 4}) != here
    monkeypatch.setattr(run, "commit", lambda: "another")
    assert run.kept_at(job) != here


def test_names_of_benchmarks() -> None:
    assert run.chosen("op,growth") == ["op_bandwidth", "op_bytes", "growth"]
    with pytest.raises(SystemExit, match="no benchmark begins with 'opp'"):
        run.chosen("opp")


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.devices("") == ["cpu"]
    with pytest.raises(SystemExit, match="no GPU"):
        run.devices("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.devices("") == ["cpu", "cuda"]


def test_bytes_by_operations() -> None:
    x, rows = torch.ones(100, 8), torch.tensor([3, 5])
    with Counting() as counting:
        x + x  # read twice, written once
    assert counting.bytes == 3 * 3200
    with Counting() as counting:
        x.view(50, 16)[:10].t()
    assert (counting.bytes, counting.calls) == (0, 0)
    with Counting() as counting:
        x.index_select(0, rows)  # the two rows, the index, the result
    assert counting.bytes == 64 + 16 + 64
    with Counting() as counting:
        x.index_copy_(0, rows, torch.ones(2, 8))
    assert counting.bytes == 64 + 2 * (16 + 64)  # ones is written too


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone marks pages")
def test_pages_that_were_touched() -> None:
    page = 4096
    held = Touched([torch.zeros(64 * page, dtype=torch.uint8), torch.zeros(3, 5)])
    big, small = held.tensors
    assert held.bytes(lambda: None) in (None, 0)
    found = held.bytes(lambda: big[: 8 * page].sum())
    if found is None:
        pytest.skip("this kernel does not let a process clear its marks")
    assert found == 8 * page
    assert held.bytes(lambda: (big[::page].sum(), small.sum())) == 65 * page


@pytest.mark.parametrize(("policy", "budget"), [("h2o", 40), ("ada_snapkv", 40)])
def test_calls_of_the_op_are_those_of_the_model(policy: str, budget: int) -> None:
    """The op gives what attention gives; what must be read is what the cache is said to hold."""
    model = tiny.llama(4, 2, layers=2)
    with torch.no_grad():
        calls = calls_of_a_step(model, policy, budget, tiny.tokens(2, 83))
    assert len(calls) == 2
    for call in calls:
        assert call.ragged == (policy == "ada_snapkv")
        assert call.live_bytes() == 2 * 2 * budget * 16 * 4 * 2  # rows, heads, entries of K and V
        wanted = expected(call)
        torch.testing.assert_close(call.again().run().double(), wanted, rtol=1e-4, atol=1e-5)


def results() -> dict[str, Any]:
    """Of a run of the op alone, with figures that were made up."""
    one = {"live_bytes": 10**8, "ragged": False, "off": 1e-7, "step_s": [0.01, 0.02, 0.03]}
    found = {"h2o": one, "ada_snapkv": {**one, "ragged": True, "off": 1.0}}
    job = {"name": "2048x8", "context": 2048, "batch": 8, "dtype": "float32", "read_bandwidth": 1e10, "found": found}
    facts = {"cpu": "a", "capability": "b", "threads": 1, "torch": "c", "transformers": "d", "python": "e"}
    more = {"command": "python run.py", "date": "2026-01-01", "commit": "f", "machine": facts, "quick": False}
    return {"benchmarks": {"op_bandwidth": {"cpu": {"2048x8": {**job, "took_s": 60.0}}}}, **more}


def test_a_report_says_what_is_wrong_and_how_far(tmp_path: Path) -> None:
    text = report.markdown(results())
    assert "| h2o | even | 100 | 20.00 (15.00 to 25.00) | 5.0 | 50% | ok |" in text
    assert "WRONG: off by 1.0e+00" in text
    assert "share of read bandwidth, even heads (h2o) | 50% | >= 0.8 | 1.60x away |" in text
    assert "policies whose output is wrong | 1 | <= 0 | 1 above |" in text
    paths = report.write(results(), tmp_path, "x", whole=False)
    assert [path.name for path in paths] == ["x.md", "x.json", "x.png"]
    assert json.loads(paths[1].read_text())["aims"][0]["verdict"] == "1.60x away"


def test_a_gpus_rows_stand_beside() -> None:
    both = results()
    both["benchmarks"]["op_bandwidth"]["cuda"] = both["benchmarks"]["op_bandwidth"]["cpu"]
    titles = [grid.title for grid in report.grids(both)]
    assert [title.endswith("on cuda") for title in titles] == [False, True, False]
    assert [aim.aim for aim in report.aims(both) if aim.what.endswith("on cuda")] == [None] * 3


def decoded() -> dict[str, Any]:
    """Of a decode case, with figures that were made up: weights of 100 MB, 10 GB/s."""

    def one(ms: float, megabytes: int, policy: str | None, kl: float = 0.0) -> dict[str, Any]:
        spec = {"policy": policy, "budget": 0.2 if policy == "h2o" else 1.0, "inner": "eager"}
        times = {"step_s": [ms / 1e3] * 3, "kv_bytes": megabytes * 10**6, "compile_s": 1.0}
        return {"spec": spec, "kl": kl, "kl_to_full": kl, **times}

    found = {
        "HF dynamic, eager": one(40, 100, None),
        "HF static, eager": one(30, 100, None),
        "kvpass full, eager": one(24, 100, "full"),
        "kvpass h2o 20 %, eager": one(15, 20, "h2o"),
        "kvpass h2o 20 %, frozen": one(12, 20, "h2o", kl=0.1),
    }
    facts = {"context": 2048, "batch": 8, "dtype": "float32", "rounds": 3, "compiled_while_timing": 0}
    speeds = {"read_bandwidth": 1e10, "weight_bytes": 10**8, "full_bytes": 10**8}
    return {"name": "2048x8", **facts, **speeds, "contenders": found, "took_s": 1.0}


def test_aims_of_decoding_compare_the_best_of_each_side() -> None:
    found = {aim.what.split(": ")[1][:40]: aim for aim in module_of("decode").aims({"2048x8": decoded()})}
    fastest, allowed, wrong = found.values()
    assert fastest.value == pytest.approx(30 / 12)
    assert fastest.verdict == "1.40x away"
    assert allowed.value == pytest.approx((24 / 12) / (200 / 120))  # what 200 MB against 120 MB allow
    assert allowed.verdict == "PASS"
    assert wrong.value == 1


def test_a_whole_run_writes_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAGE", "README"):
        page = tmp_path / f"{name}.md"
        page.write_text(getattr(report, name).read_text())
        monkeypatch.setattr(report, name, page)
    run = results()
    run["benchmarks"]["decode"] = {"cpu": {"2048x8": decoded()}}
    for _ in range(2):
        report.write(run, tmp_path, "x", whole=True)
    page, readme = (getattr(report, name).read_text() for name in ("PAGE", "README"))
    assert page.count("### Aims") == page.count(report.BEGIN) == readme.count(report.BEGIN) == 1
    assert "| 2,048 x 8, a step | kvpass h2o 20 %, frozen | 12.0 ms | 12.0 ms | 20 MB |" in readme
    assert "| 2,048 x 8, a step | HF static, eager | 30.0 ms | 20.0 ms | 100 MB |" in readme
    assert "HF dynamic, eager" not in readme.split(report.BEGIN)[1].split(report.END)[0]


@pytest.mark.parametrize("page", [report.PAGE, report.README])
def test_pages_have_the_marks(page: Path) -> None:
    text = page.read_text()
    assert text.count(report.BEGIN) == 1
    assert report.END in text.split(report.BEGIN)[1]


@pytest.mark.wide
@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "examples/bench/run.py",
        "--quick",
        "--fresh",
        "--only",
        name,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [*found["benchmarks"]] == [name]
    assert not [aim for aim in found["aims"] if "wrong" in aim["what"] and not aim["reached"]]
    assert "WRONG" not in next(tmp_path.glob("*.md")).read_text()
