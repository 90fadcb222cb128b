"""docs/patterns.md is complete and its code is the code that the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvpass.patterns import DEFAULT

from kvpass.errors import Reason

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "patterns.md").read_text()


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_listed_with_its_hint(reason: Reason) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{reason.value}` |")]
    assert row.endswith(f" | {reason.hint} |")


@pytest.mark.parametrize("pattern", [*DEFAULT.cores, *DEFAULT.updates, DEFAULT.returned, *DEFAULT.expanded])
def test_every_pattern_is_listed(pattern: object) -> None:
    assert f"| `{pattern.name}` |" in PAGE


def test_the_worked_example_is_the_tests_file() -> None:
    assert f"```python\n{(ROOT / 'tests' / 'models' / 'own_attention.py').read_text()}```" in PAGE


def test_ten_minutes() -> None:
    """At 220 words a minute."""
    assert len(PAGE.split()) < 2200


def test_the_scan_times_are_those_of_the_benchmark() -> None:
    assert (ROOT / "examples" / "bench" / "results" / "scan.md").read_text() in PAGE
