"""The code blocks of README.md and docs/, run as they are printed.

    python -P tests/support/snippets.py PAGE ..         # run pages one after the other, print what their blocks print
    python -P tests/support/snippets.py --write [PAGE]  # renew the outputs that pages show

Blocks of a page share a namespace, top to bottom, and an empty folder; what the reader already has (a model, its
inputs) comes from given.py. By the word behind the fence:

* `python` is executed; `yaml` is a whole policy: written to NAME.yaml, loaded and checked with a budget.
* `sh`: `kvpass` is run; of make, pip and python it is checked that what they name exists (KNOWN).
* `output`: what the block above prints, or the error of kvpass that it raises, to the letter; a line `...` stands for
  any lines, `...` in a line for any text.
* `text`, `diff`, `mlir` are not run: they show what other programs wrote, never code of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN, SHOWN = ("python", "yaml", "sh"), ("text", "diff", "mlir", "mermaid")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind` is the word behind the fence, `line` that of its first line of text, from 1."""

    kind: str
    text: str
    line: int


def pages() -> list[str]:
    """Every page that could hold code, as a path from the root."""
    return ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(text)]


def run_page(page: str) -> list[tuple[Block, str]]:
    """The blocks of RUN, each with what it printed. The working folder becomes the page's."""
    found = blocks((ROOT / page).read_text())
    module = types.ModuleType("__main__")
    module.__dict__.update(given_for(page))
    sys.modules["__main__"] = module
    return [(block, run_block(block, page, module.__dict__)) for block in found if block.kind in RUN]


def run_block(block: Block, page: str, names: dict[str, Any]) -> str:
    """What a block prints, and the error of kvpass that it ends with, as `Name: message`."""
    import kvpass

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            {"python": run_python, "yaml": run_yaml, "sh": run_shell}[block.kind](block, page, names)
        except kvpass.KVPassError as error:
            print(f"{type(error).__name__}: {error}")
    return out.getvalue()


def run_python(block: Block, page: str, names: dict[str, Any]) -> None:
    """Line numbers of a traceback are those of the page."""
    exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec", dont_inherit=True), names)


def run_yaml(block: Block, page: str, names: dict[str, Any]) -> None:
    import yaml

    import kvpass

    file = Path(f"{yaml.safe_load(block.text)['name']}.yaml")
    file.write_text(block.text)
    kvpass.Policy.load(str(file)).with_budget(0.2)


def run_shell(block: Block, page: str, names: dict[str, Any]) -> None:
    for line in block.text.splitlines():
        if words := shlex.split(line, comments=True):
            assert words[0] in KNOWN, f"{page}:{block.line}: {words[0]} is not in KNOWN"
            KNOWN[words[0]](words[1:])


def kvpass_command(words: list[str]) -> None:
    """In this process, `>` included; the error that a command ends with is printed, as a terminal shows it."""
    from kvpass.api.cli import main

    words, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, "")
    out, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(wrong):
        status = main(words)
    assert status == int(bool(wrong.getvalue())), wrong.getvalue()
    if target:
        Path(target).write_text(out.getvalue())
    print("" if target else out.getvalue(), wrong.getvalue(), sep="", end="")


def make_command(words: list[str]) -> None:
    """The target is one of the Makefile's."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pip_command(words: list[str]) -> None:
    """What is installed from here has the extras that it names; the packaging tests install the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install", words
    for word in words[1:]:
        ours = re.fullmatch(r"(?:\.|kvpass|dist/\S+\.whl)(?:\[([\w,]+)\])?", word)
        for extra in (ours[1] or "").split(",") if ours else ():
            assert not extra or extra in project["optional-dependencies"], word


def python_command(words: list[str]) -> None:
    """`python -m build` is what the packaging tests do; a script must be there."""
    scripts = [word for word in words if word.endswith(".py")]
    assert scripts or words[:2] == ["-m", "build"], words
    assert all((ROOT / script).is_file() for script in scripts), words


KNOWN = {"kvpass": kvpass_command, "make": make_command, "pip": pip_command, "python": python_command}


def given_for(page: str) -> dict[str, Any]:
    """What the reader of a page has before its first block: names, and files in the working folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    source = ROOT / "tests" / "support" / "given.py"
    exec(compile(source.read_text(), str(source), "exec", dont_inherit=True), given := {"__file__": str(source)})
    return names | given["GIVEN"].get(page, dict)()


def without_inductor() -> None:
    """Whatever a snippet names as its inner compiler, the rewritten graph runs node by node: minutes less."""
    from kvpass.pipeline import compose
    from kvpass.pipeline.inner_options import EAGER

    real: Any = compose.compile_inner
    compose.compile_inner = lambda name, *rest, **more: real(EAGER, *rest, **more)


def as_a_user() -> None:
    """Every warning that a user would see on stderr, those from lines of kvpass too."""
    without_inductor()
    warnings.simplefilter("default", append=True)
    for of in (DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("always", category=of, module=r"(kvpass|kernels|patterns)(\.|$)")


def expected(shown: str) -> str:
    """A pattern for an `output` block."""
    lines = (
        r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"[ ]*\n"
        for line in shown.splitlines()
    )
    return "".join(lines)


def mismatch(page: str, results: list[tuple[Block, str]]) -> str:
    """The first block whose printed output is not what it printed, or that raised without saying so; "" for none."""
    printed = {block.line: text for block, text in results}
    found = blocks((ROOT / page).read_text())
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.kind not in RUN:
            continue
        text = printed[block.line]
        shows = after is not None and after.kind == "output"
        if shows and not re.fullmatch(expected(after.text), text):
            return f"{page}:{after.line} shows\n{after.text}\nbut the block above it prints\n{text}"
        if not shows and re.search(r"^\w*Error: ", text, re.MULTILINE):
            return f"{page}:{block.line} ends with\n{text}"
    return ""


def renewed(page: str, results: list[tuple[Block, str]]) -> str:
    """The page with the outputs of this run. Those with `...` stay if they still hold."""
    text, printed = (ROOT / page).read_text(), {block.line: out for block, out in results}
    found = list(FENCE.finditer(text))
    for block, after in reversed(list(itertools.pairwise(found))):
        line = text.count("\n", 0, block.start(2)) + 1
        if after[1] == "output" and not re.fullmatch(expected(after[2]), printed[line]):
            text = text[: after.start(2)] + printed[line] + text[after.end(2) :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if not args.pages:
        for page in pages():
            if any(block.kind == "output" for block in blocks((ROOT / page).read_text())):
                subprocess.run([sys.executable, "-P", __file__, "--write", page], check=True)
        return
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    as_a_user()
    for page in args.pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            results = run_page(page)
        for block, text in results:
            print(f"--- {page}:{block.line} {block.kind}\n{text}", end="")
        if args.write:
            (ROOT / page).write_text(renewed(page, results))
        elif wrong := mismatch(page, results):
            raise SystemExit(wrong)


if __name__ == "__main__":
    main()
