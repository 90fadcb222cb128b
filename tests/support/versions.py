"""`make versions`: a chosen part of the tests with other versions of Python, torch and transformers, each in an
environment of its own. Writes docs/versions.md and docs/versions.json, row by row.

    python -P tests/support/versions.py [--only transformers5.17,py3.12] [--resume] [--keep]
    python -P tests/support/versions.py --canary [--torch SPEC]

--only: rows whose folder (py3.11-torch2.13.0-transformers5.24.0) has one of these words in its name; the others keep
what they had. --resume: leave out rows that ran at this
commit. --canary: one row of whatever pip takes for newest, compared with constraints.txt; writes nothing, exits with 1
if a test fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import versions_page
from versions_row import Row, differences, drop, run

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.11"

ROWS = [
    Row(PYTHON, "2.13.0", "5.24.0"),
    Row(PYTHON, "2.13.0", "5.17.0"),
    Row(PYTHON, "2.13.0", "5.23.0"),
    Row(PYTHON, "2.13.0", "5.2.0"),
    Row(PYTHON, "2.13.0", "5.0.0"),
    Row("3.12", "2.11.0", "5.17.0"),  # what the GPU machine of the project has
    Row(PYTHON, "2.11.0", "5.17.0"),
    Row(PYTHON, "2.14.1", "5.24.0"),
    Row("3.13", "2.13.0", "5.24.0"),
    Row("3.12", "2.13.0", "5.24.0"),
]


def commit() -> str:
    """Of the working tree, with a + where it has changes."""
    name = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    return subprocess.run(name, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def renew(rows: list[Row], keep: bool) -> bool:
    """Run the rows, writing the page after each. True if all passed. Another process may write other rows meanwhile."""
    good, now = True, commit()
    for i, row in enumerate(rows):
        print(f"[{i + 1}/{len(rows)}] {row.name}", flush=True)
        outcome = run(row, now)
        known = versions_page.read() | {row.name: outcome}
        print(f"    {outcome.words()}", *outcome.failed, sep="\n    ", flush=True)
        versions_page.write([known[r.name] for r in ROWS if r.name in known])
        good = good and outcome.passes
        if not keep:
            drop(row, base=all(row.base != later.base for later in rows[i + 1 :]))
    return good


def canary(torch: str) -> bool:
    """The newest of everything. True if all passed."""
    row = Row(f"{sys.version_info.major}.{sys.version_info.minor}", torch, "newest")
    drop(row, base=True)
    outcome = run(row, commit())
    newer = differences(outcome.versions, ROOT / "constraints.txt")
    print("other than in constraints.txt:", *(newer or ["nothing"]), sep="\n    ")
    print(outcome.words(), *outcome.failed, sep="\n    ")
    drop(row, base=True)
    return outcome.passes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose folder has one of these words in its name, by commas")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that ran at this commit")
    parser.add_argument("--keep", action="store_true", help="keep the environments (.cache/versions)")
    parser.add_argument("--canary", action="store_true", help="the newest of everything")
    parser.add_argument("--torch", default="newest", help="canary: this version of torch")
    options = parser.parse_args()
    if options.canary:
        return 0 if canary(options.torch) else 1
    known = versions_page.read()
    words = [word for word in options.only.split(",") if word]
    chosen = [row for row in ROWS if not words or any(word in row.own.name for word in words)]
    if not chosen:
        parser.error(f"no row has one of these words; there are: {', '.join(row.own.name for row in ROWS)}")
    if options.resume:
        done = {name for name, outcome in known.items() if outcome.commit == commit()}
        chosen = [row for row in chosen if row.name not in done]
    return 0 if renew(chosen, options.keep) else 1


if __name__ == "__main__":
    sys.exit(main())
