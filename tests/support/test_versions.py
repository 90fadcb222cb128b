"""The parts of `make versions`, `make canary` and `make lock` that need no other environment."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lock
import versions
import versions_page
import versions_row
from versions_row import Broken, Outcome, Row

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
def test_good(): pass
@pytest.mark.skipif(True, reason="to be counted")
def test_left_out(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_bad(n): assert n == 1
"""


def outcome(name: str, **more: Any) -> Outcome:
    return Outcome(name, **{"status": "ran", "date": "2026-11-27", "commit": "abc", **more})


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Row:
    monkeypatch.setattr(versions_row, "ENVIRONMENTS", tmp_path)
    made = Row("3.11", "2.13.0", "5.24.0")
    made.own.mkdir()
    return made


def run_here(text: str, row: Row, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """These tests in the interpreter that runs this one."""
    file = row.own / "test_of_a_row.py"
    file.write_text(text)
    monkeypatch.setattr(versions_row, "CHOICE", ["--rootdir", str(row.own), "-c", "/dev/null", str(file)])
    monkeypatch.setattr(versions_row, "TESTS", [])
    result = outcome(row.name)
    versions_row.tests(Path(sys.executable), row, result)
    return result


def test_failures_are_counted_and_named(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_here(TESTS, row, monkeypatch)
    assert result.counts == {"passed": 2, "failed": 1, "skipped": 1}
    assert result.failed == ["test_of_a_row::test_bad[2]"]
    assert not result.passes


def test_a_file_that_cannot_be_imported_is_no_pass(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_here("import no_such_module", row, monkeypatch)
    assert result.counts["failed"] == 1
    assert not result.passes


def test_no_tests_are_no_pass(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Broken, match="pytest ended with 5"):
        run_here("", row, monkeypatch)


def test_an_interpreter_that_is_not_there() -> None:
    with pytest.raises(Broken, match=r"no Python 3\.99 on this machine"):
        versions_row.interpreter("3.99")
    assert versions_row.run(Row("3.99", "1", "1"), "abc").status == "no Python 3.99 on this machine"


def test_what_pip_says_is_the_reason() -> None:
    with pytest.raises(Broken, match="not installed: No module named"):
        versions_row.quietly(sys.executable, "-c", "raise SystemExit('No module named x')")


def test_the_page_tells_passes_failures_and_what_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions_page, "DOCS", tmp_path)
    had = {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.17.0"}
    counts = {"passed": 7, "failed": 1, "skipped": 2}
    rows = [outcome("a", versions=had, counts=counts, failed=["test_x::test_y"], seconds=9)]
    rows.append(outcome("b", status="no Python 3.14 on this machine"))
    versions_page.write(rows)
    text = (tmp_path / "versions.md").read_text()
    assert "| 3.11.7 | 2.13.0+cpu | 5.17.0 | 7 | 1 | 2 | 9 | 2026-11-27 | `abc` |" in text
    assert "* a: `test_x::test_y`" in text
    assert "* b: no Python 3.14 on this machine" in text
    assert versions_page.read() == {"a": rows[0], "b": rows[1]}


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    known = versions_page.read()
    assert set(known) <= {row.name for row in versions.ROWS}
    assert (ROOT / "docs" / "versions.md").read_text() == versions_page.page(list(known.values()))


def test_the_chosen_tests_are_there() -> None:
    for test in versions_row.TESTS:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text()


def test_differences_from_the_committed_versions(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("# a==1\ntorch==2.13.0\nnumpy==2.4.6\npeft==0.21.2\n")
    installed = {"torch": "2.13.0+cpu", "numpy": "2.5.0", "other": "1"}
    assert versions_row.differences(installed, tmp_path / "c.txt") == ["numpy 2.4.6 -> 2.5.0"]


def test_what_pip_resolves_becomes_constraints() -> None:
    names = [("torch", "2.13.0+cpu"), ("PyYAML", "6.0.4"), ("kvpass", "0.1.0"), ("nvidia-cublas", "13.0")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in names]}
    lines = lock.text(lock.versions(report), "3.11").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["pyyaml==6.0.4", "torch==2.13.0"]


def test_the_committed_constraints_pin_what_pyproject_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(n for extra in project["optional-dependencies"].values() for n in extra)]
    names = {lock.normal(re.split(r"[<>=\[]", want)[0]) for want in wanted} - {"kvpass"}
    pinned = (ROOT / "constraints.txt").read_text()
    assert {name for name in names if not re.search(rf"^{name}==[\w.]+$", pinned, re.M)} == set()
