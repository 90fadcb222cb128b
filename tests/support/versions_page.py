"""docs/versions.md and docs/versions.json: what came of each combination of versions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from versions_row import TESTS, Outcome

DOCS = Path(__file__).resolve().parents[2] / "docs"

HEAD = """# Versions

Written by `make versions` (tests/support/versions.py): a chosen part of the tests, each row in an environment of its
own. It leaves out the inner compilers `inductor` and `aot_eager`, SmolLM2 and what needs a GPU; `make test` runs
everything with the versions of [constraints.txt](../constraints.txt). `make canary` runs the same part with the newest
of everything.

| Python | torch | transformers | passed | failed | skipped | seconds | date | commit |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def read() -> dict[str, Outcome]:
    """The rows of docs/versions.json, by name."""
    file = DOCS / "versions.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return {row["name"]: Outcome(**row) for row in rows}


def write(outcomes: list[Outcome]) -> None:
    """Both files."""
    (DOCS / "versions.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (DOCS / "versions.md").write_text(page(outcomes))


def page(outcomes: list[Outcome]) -> str:
    ran = [outcome for outcome in outcomes if outcome.status == "ran"]
    text = HEAD + "".join(line(outcome) for outcome in ran)
    if not ran:
        text += "\nNo row has run to its end yet.\n"
    failures = [f"* {outcome.name}: `{test}`\n" for outcome in ran for test in outcome.failed]
    if failures:
        text += "\n## What fails\n" + "".join(failures)
    others = [f"* {o.name}: {o.status} ({o.date}, {o.commit})\n" for o in outcomes if o.status != "ran"]
    if others:
        text += "\n## What did not run\n" + "".join(others)
    text += "\n## The tests\n" + "".join(f"* {test}\n" for test in TESTS)
    return text + (
        "\nA commit with a `+` had changes that were not committed. Seconds are those of a machine with two cores that "
        "may have had other work. All packages of each row are in [versions.json](versions.json).\n"
    )


def line(outcome: Outcome) -> str:
    v, n = outcome.versions, outcome.counts
    cells = [v["python"], v["torch"], v["transformers"], n["passed"], n["failed"], n["skipped"], outcome.seconds]
    return "| " + " | ".join(map(str, [*cells, outcome.date, f"`{outcome.commit}`"])) + " |\n"
