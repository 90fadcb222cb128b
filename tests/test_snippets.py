"""README.md and docs/: every block of code runs as it is printed, prints what the page says, and warns of nothing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "support" / "snippets.py"

spec = importlib.util.spec_from_file_location("snippets", SCRIPT)
assert spec is not None
assert spec.loader is not None
snippets = importlib.util.module_from_spec(spec)
sys.modules["snippets"] = snippets
spec.loader.exec_module(snippets)

PAGES = snippets.pages()
WITH_CODE = [page for page in PAGES if any(b.kind in snippets.RUN for b in snippets.blocks((ROOT / page).read_text()))]
OURS = re.compile(r"^\s*(import kvpass|from kvpass|kvpass \w+|make \w+|.*\bkvpass\.\w+\()", re.MULTILINE)
NEEDS = {"docs/export.md": "torch_mlir"}  # an optional package, see the Makefile


ALONE = [page for page in WITH_CODE if page in NEEDS or page == "README.md"]
PROCESSES = [*([page] for page in ALONE), [page for page in WITH_CODE if page not in ALONE]]
"""Most pages share a process: to import torch and transformers takes longer than a page."""


@pytest.mark.parametrize("pages", PROCESSES, ids=" ".join)
def test_the_snippets_of_pages_run_as_printed(pages: list[str]) -> None:
    needed = [NEEDS[page] for page in pages if page in NEEDS and importlib.util.find_spec(NEEDS[page]) is None]
    if needed:  # an extra that the demo's and the tests' own environment has: elsewhere pytest names the skip (-ra)
        pytest.skip(f"{', '.join(needed)} is not installed")
    command = [sys.executable, "-P", str(SCRIPT), *pages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    foreign = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("kvpass")]
    assert not foreign, "what a user would see on stderr:\n" + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_no_code_of_a_page_escapes(page: str) -> None:
    text = (ROOT / page).read_text()
    found = snippets.blocks(text)
    assert len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) == 2 * len(found), "a fence that is not read as one"
    assert {block.kind for block in found} <= {*snippets.RUN, *snippets.SHOWN, "output"}
    for block in found:
        ours = OURS.search(block.text)
        assert block.kind in (*snippets.RUN, "output") or not ours, f"{page}:{block.line} shows code that is not run"
    for before, block in zip([None, *found], found, strict=False):
        assert block.kind != "output" or (before is not None and before.kind in snippets.RUN)


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/debugging.md", "docs/policy-files.md"} <= set(WITH_CODE)


PAGE = """
```python
x = 1
print(x)
```
```output
1
```
```python
import kvpass
kvpass.Policy.load("h3o")
```
```output
PolicyError: ...
...
```
"""


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (("", ""), ""),
        (("\n1\n", "\n2\n"), "shows\n2"),
        (("```output\nPolicyError: ...\n...\n```\n", ""), "ends with\nPolicyError"),
        (("h3o", "h2o"), "shows\nPolicyError"),
    ],
)
def test_a_page_that_lies_is_found_out(
    change: tuple[str, str], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.replace(*change)
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(snippets, "ROOT", tmp_path)
    names: dict[str, object] = {}
    code = [block for block in snippets.blocks(text) if block.kind == "python"]
    runs = [(block, snippets.run_block(block, "page.md", names)) for block in code]
    found = snippets.mismatch("page.md", runs)
    assert (wrong in found) if wrong else not found
