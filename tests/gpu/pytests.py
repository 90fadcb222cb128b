"""Runs pytest and makes a row of each test: in this process, or on a GPU's machine in several."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from gpu.device import GPU
from gpu.record import Record

WORKERS = 12


class Rows:
    """A plugin that writes down how each test ended. A test that was skipped has not shown anything: an error."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (not report.passed and report.when != "teardown") or report.failed:
            row = {"case": report.nodeid.split("/")[-1], "seconds": round(report.duration, 2)}
            self.record.add(
                row if report.passed else row | {"error": f"{report.outcome}: {report.longreprtext[-500:]}"}
            )

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.record.add({"case": report.nodeid, "error": report.longreprtext[-500:]})


def run(chosen: list[str], record: Record) -> None:
    """`chosen`: files or single tests, as pytest names them."""
    workers = min(WORKERS, os.cpu_count() or 1) if GPU and importlib.util.find_spec("xdist") else 0
    options = ["-q", "--no-header", "-m", "", "-p", "no:cacheprovider", *(["-n", str(workers)] if workers else [])]
    code = pytest.main([*options, *chosen], plugins=[Rows(record)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record.add({"case": "pytest", "error": f"pytest ended with {code!r}"})
