"""Who may import what, and how big a file may be. The arrows are those of the layout: data flows down, never back."""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"kvpass": "kvpass", "kernels": "kvpass.kernels", "patterns": "kvpass.patterns"}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))

WORDS = {"terms", "errors"}
ARROWS = {
    # resolved on first use
    "__init__": {"compiler", "compiled", "explaining", "mlir", "reporting", "rewriting", "runtime.marks", "policy"}
    | {"errors", "kernels.scorers.registry", "kernels.scorers.seen"},
    "__main__": {"cli"},
    "cli": {"__version__", "policy", "kernels.scorers.registry", "kernels.scorers.trial", "kernels.errors"} | WORDS,
    "terms": set(),
    "errors": set(),
    "kernels": {"kernels"},
    "match": {"match"} | WORDS,
    "policy": {"policy", "kernels.rule", "kernels.scorers.registry", "kernels.tables", "kernels.errors"}
    | WORDS,  # ends as a Rule: data, no tensors
    "patterns": {"patterns", "match", "site"} | WORDS,
    "site": {"match"} | WORDS,
    "table": {"site"} | WORDS,
    "scan": {"match", "site", "table", "site_rules", "mixed_sites", "unclaimed"} | WORDS,
    "unclaimed": {"match", "site", "table", "near"} | WORDS,
    "near": {"match"} | WORDS,
    "mixed_sites": {"match", "site", "site_rules"} | WORDS,
    "site_rules": {"match", "site"} | WORDS,
    "ops": {"terms", "kernels"},
    "runtime": {
        "runtime",
        "ops",
        "kernels.rule",
        "kernels.ragged",
        "kernels.errors",
        "kernels.layers",
        "kernels.late",
        "kernels.reindex",
    }
    | WORDS,
    "plan": {"policy", "site", "table", "match", "kernels.rule"} | WORDS,
    "emit": {"emit_nodes", "emit_heads", "emit_masks", "plan", "site", "match"} | WORDS,
    "emit_masks": {"emit_nodes", "emit_heads", "site", "match"} | WORDS,
    "emit_heads": {"emit_nodes", "site", "match"} | WORDS,
    "emit_nodes": {"ops", "site", "match"} | WORDS,
    "retire": {"site", "match"} | WORDS,
    "lower": {"emit", "retire", "plan", "site", "match", "runtime.bind", "runtime.turning"} | WORDS,
    "verify": {"plan", "lower", "match"} | WORDS,
    "isolate": {"site", "match"} | WORDS,
    "check_sites": {"isolate", "plan", "lower", "site", "match", "runtime", "ops", "kernels"} | WORDS,
    "region_form": {"match"} | WORDS,
    "regions": {"region_form", "match"} | WORDS,
    "stitch": {"regions", "region_form", "match"} | WORDS,
    "progress": {"debug", "match"} | WORDS,
    "inner": {"regions", "stitch", "progress"} | WORDS,
    "arguments": {"inner", "patterns"} | WORDS,
    "graphs": {"plan", "site", "table"} | WORDS,
    "debug": {"debug", "plan", "site", "lower", "match"} | WORDS,
    "reporting": {"holdings", "report_text", "runtime", "kernels.ranking", "kernels.ragged", "kernels.rule"} | WORDS,
    "holdings": {"runtime"} | WORDS,
    "report_text": set(),
    "next_step": set(),
    "explaining": {"arguments", "dynamo", "facade", "next_step", "twin"}
    | {"policy", "site", "table", "scan", "plan", "patterns", "match"}
    | WORDS,
    "compiled": {"arguments", "compiler", "compilation", "facade", "policy", "errors", "patterns"},  # patterns: a type
    "compilation": {"compiler", "dynamo", "facade", "runtime"} | WORDS,
    "facade": {"compilation", "unserved"} | WORDS,  # the two are one object's halves
    "dynamo": {"progress"} | WORDS,
    "unserved": {"policy"} | WORDS,
    "dense": {"match", "site", "table"} | WORDS,
    "twin": set(),
    "pure": {"ops", "kernels"},
    "standalone": {"lower", "pure", "ops", "match", "runtime.bind"} | WORDS,
    "exported": {"standalone", "match"} | WORDS,
    "mlir": {"rewriting", "exported", "pure"} | WORDS,
}
ROOTS = {"compiler", "rewriting"}  # composes all the others
ENVIRONMENT_READERS = {"kvpass/debug", "kernels/choose.py", "kernels/triton_launch.py"}


def name_of(file: Path) -> str:
    """`kvpass/match/calls.py` is `match.calls`, `kernels/rule.py` is `kernels.rule`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "kvpass" else parts).removesuffix(".__init__")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def absolute(file: Path, node: ast.ImportFrom) -> str:
    """The module of `from module import ...`, dots resolved."""
    if not node.level:
        return node.module or ""
    room, *below = file.relative_to(ROOT).parts
    package = [ROOMS[room], *below[: len(below) - node.level]]
    return ".".join([*package, *([node.module] if node.module else [])])


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{absolute(file, node)}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def within(name: str, area: str) -> bool:
    return name == area or name.startswith(area + ".")


def ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


def functions(files: list[Path]) -> dict[str, int]:
    """Lines of every function, by where it is."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        f"{ids(file)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for file in files
        for node in ast.walk(tree(file))
        if isinstance(node, kinds)
    }


def in_room(*rooms: str) -> list[Path]:
    return [file for file in FILES if file.relative_to(ROOT).parts[0] in rooms]


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_follow_the_arrows(file: Path):
    name = name_of(file)
    area = name.split(".")[0]
    if area in ROOTS:
        return
    assert area in ARROWS, f"{area} is new: say in ARROWS what it may import"
    ours = {full.removeprefix("kvpass.") for full in imported(file) if full.startswith("kvpass.")}
    wrong = {target for target in ours if not any(within(target, allowed) for allowed in ARROWS[area])}
    assert not wrong, f"{name} may import {sorted(ARROWS[area])}"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_foreign_imports(file: Path):
    tops = {full.split(".")[0] for full in imported(file)}
    assert not tops & {"tests", "examples", "transformers"}
    assert not tops & {"kernels", "patterns"}, "they are installed as kvpass.kernels and kvpass.patterns"
    if not (file.is_relative_to(ROOT / "kernels") and file.stem.startswith(("triton", "compile_report"))):
        assert "triton" not in tops


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_few_files_read_the_environment(file: Path):
    reads = any(isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"} for node in ast.walk(tree(file)))
    assert not reads or any(ids(file).startswith(reader) for reader in ENVIRONMENT_READERS)


@pytest.mark.parametrize("file", in_room("kvpass", "patterns"), ids=ids)
def test_compiler_files_stay_small(file: Path):
    assert len(file.read_text().splitlines()) <= 300


def test_compiler_functions_stay_small():
    lines = functions(in_room("kvpass", "patterns"))
    assert statistics.median(lines.values()) <= 12
    ninth = statistics.quantiles(lines.values(), n=10)[-1]
    assert ninth <= 40, sorted(lines.items(), key=lambda item: -item[1])[:10]


def test_kernels_stay_within_120_lines():
    assert {where: n for where, n in functions(in_room("kernels")).items() if n > 120} == {}


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_every_module_says_what_it_is(file: Path):
    assert ast.get_docstring(tree(file))
