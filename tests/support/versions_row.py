"""One combination of versions: its environment, and the chosen tests in it.

Rows with the same Python and torch share one environment with torch and what the tests need; each row's own has
transformers and kvpass and sees the shared one behind them. What is imported is asked of the row's interpreter.
"""

from __future__ import annotations

import datetime
import glob
import json
import os
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".cache" / "versions"
LIMIT = 60 * 60
"""Seconds for the tests of a row. On two idle cores they take some 3 minutes."""

TESTS = [
    "tests/sites/test_masks_of_models.py",
    "tests/runtime/test_store.py",
    "tests/runtime/test_shell.py",
    "tests/graph/test_module_names.py",
    "tests/e2e/test_identity.py",
    "tests/e2e/test_static_cache.py",
    "tests/e2e/test_refusals.py",
    "tests/e2e/test_shells.py",
    "tests/e2e/test_multiturn.py::test_generate_twice[h2o]",
    "tests/e2e/test_multiturn.py::test_prompt_in_chunks[snapkv]",
    "tests/e2e/test_multiturn.py::test_torch_compile_by_name",
    "tests/e2e/test_families.py::test_family[llama-sdpa]",
    "tests/e2e/test_families.py::test_family[gpt2-eager]",
    "tests/e2e/test_families.py::test_family[gemma2-eager]",
]
CHOICE = ["-m", "not model and not gpu and not wide", "-k", "not inductor and not aot_eager"]
NEEDS = ["numpy", "networkx", "pydantic", "PyYAML", "pytest", "hypothesis", "psutil", "setuptools>=77"]
ASK = """
import json, sys
from importlib.metadata import distributions
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in reversed(list(distributions()))}
import kvpass, torch, transformers
json.dump({**found, "python": sys.version.split()[0], "torch": torch.__version__,
           "transformers": transformers.__version__, "cuda": torch.version.cuda or ""}, sys.stdout)
"""


class Broken(RuntimeError):
    """The environment cannot be had; what said so."""


@dataclass(frozen=True)
class Row:
    """Versions asked for; `newest`: whatever pip takes."""

    python: str
    torch: str
    transformers: str

    @property
    def name(self) -> str:
        return f"python {self.python}, torch {self.torch}, transformers {self.transformers}"

    @property
    def base(self) -> Path:
        return ENVIRONMENTS / f"py{self.python}-torch{self.torch}"

    @property
    def own(self) -> Path:
        return ENVIRONMENTS / f"{self.base.name}-transformers{self.transformers}"


@dataclass
class Outcome:
    """What came of a row. `status`: `ran`, or why not."""

    name: str
    status: str
    date: str
    commit: str
    versions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: int = 0

    @property
    def passes(self) -> bool:
        return self.status == "ran" and not self.failed and self.counts.get("passed", 0) > 0

    def words(self) -> str:
        if self.status != "ran":
            return self.status
        return ", ".join(f"{n} {what}" for what, n in self.counts.items() if n) + f" in {self.seconds} s"


def requirement(name: str, version: str) -> str:
    return name if version == "newest" else f"{name}=={version}"


def interpreter(version: str) -> str:
    """A Python of this version: on PATH, or one of pyenv's."""
    found = [
        shutil.which(f"python{version}"),
        *sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))),
    ]
    for path in filter(None, found):
        said = subprocess.run([path, "--version"], capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.startswith(f"Python {version}."):
            return path
    raise Broken(f"no Python {version} on this machine")


def quietly(*command: object) -> None:
    """Run it; its last line is the reason if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Broken(f"not installed: {lines[-1] if lines else 'no reason given'}")


def prepare(row: Row) -> Path:
    """The row's interpreter, everything installed."""
    python = interpreter(row.python)
    base, own = row.base / "bin" / "python", row.own / "bin" / "python"
    if not (row.base / "complete").exists():
        shutil.rmtree(row.base, ignore_errors=True)
        quietly(python, "-m", "venv", row.base)
        install = [base, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
        quietly(*install, requirement("torch", row.torch))  # alone and first: see the Makefile
        quietly(*install, *NEEDS)
        (row.base / "complete").touch()
    shutil.rmtree(row.own, ignore_errors=True)
    quietly(python, "-m", "venv", "--without-pip", row.own)
    folders = [next(env.glob("lib/python*/site-packages")) for env in (row.own, row.base)]
    (folders[0] / "zz_base.pth").write_text(f"{folders[1]}\n")
    install = [base, "-m", "pip", "--python", own, "install", "-q", "--disable-pip-version-check", "--no-compile"]
    quietly(*install, requirement("transformers", row.transformers), "accelerate")
    quietly(*install, "--no-deps", "--no-build-isolation", "-e", ".")
    return own


def drop(row: Row, base: bool) -> None:
    shutil.rmtree(row.own, ignore_errors=True)
    if base:
        shutil.rmtree(row.base, ignore_errors=True)


def run(row: Row, commit: str) -> Outcome:
    """Prepare the row and run the tests in it."""
    outcome = Outcome(row.name, "ran", datetime.date.today().isoformat(), commit)
    try:
        python = prepare(row)
        asked = subprocess.run([python, "-P", "-c", ASK], cwd=ROOT, capture_output=True, text=True)
        if asked.returncode:
            raise Broken(f"not imported: {asked.stderr.strip().splitlines()[-1]}")
        outcome.versions = json.loads(asked.stdout)
        tests(python, row, outcome)
    except Broken as error:
        outcome.status = str(error)
    return outcome


def tests(python: Path, row: Row, outcome: Outcome) -> None:
    """Run them; counts and names of failures come from pytest's own XML."""
    report, start = row.own / "tests.xml", time.monotonic()
    command = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *CHOICE, *TESTS]
    with open(row.own.with_suffix(row.own.suffix + ".log"), "w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            raise Broken(f"the tests took longer than {LIMIT} s") from None
    outcome.seconds = round(time.monotonic() - start)
    if not report.exists():
        raise Broken(f"pytest ended with {code} and no results: see {log.name}")
    cases = list(ET.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    outcome.failed = sorted(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in bad)
    outcome.counts = {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
    if code and not bad:
        raise Broken(f"pytest ended with {code}: see {log.name}")


def differences(versions: dict[str, str], constraints: Path) -> list[str]:
    """`name old -> new` for each installed package that is not as the file pins it."""
    pinned = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line and line[0] != "#")
    installed = {name: version.partition("+")[0] for name, version in versions.items()}
    pairs = ((name, old, installed.get(name)) for name, old in pinned.items())
    return [f"{name} {old} -> {new}" for name, old, new in pairs if new not in (None, old)]
