"""Who may import what, and how big a file may be. The arrows are those of the layout: data flows down, never back."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"kvpass": "kvpass", "kernels": "kvpass.kernels", "patterns": "kvpass.patterns"}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))

LOOSE = {"__init__", "__main__", "errors", "terms", "ops"}
"""Files of kvpass/ that are in no room: what Python asks for by name, the words of all rooms, and the
ops' registration: what graphs and kernels share."""

RULES = {"kernels.rule", "kernels.budget", "kernels.timing", "kernels.ranks"}
"""Records that every room may read: the rule itself, and the three that all features ask."""

ARROWS = {
    "graph": set(),
    "patterns": {"graph", "sites.site"},
    "sites": {"graph"},
    "policy": {"kernels.rank", "kernels.attention", "kernels.codecs", "kernels.exits", *RULES},
    "plan": {"graph", "sites", "policy", "runtime", "kernels"},
    "runtime": {"ops", "kernels.slots", "kernels.rank", "kernels.after_call", *RULES},
    "lowering": {"graph", "sites", "plan", "runtime", "ops", "kernels"},
    "proof": {"graph", "sites", "plan", "lowering", "runtime", "kernels"},
    "debug": {"graph", "sites", "plan", "lowering"},
    "pipeline": {"graph", "patterns", "sites", "policy", "plan", "lowering", "proof", "runtime", "debug", "kernels"},
    "model": {"pipeline", "policy", "runtime"},
    "tune": {"model", "policy"},
    "api": {
        "graph",
        "patterns",
        "sites",
        "policy",
        "plan",
        "lowering",
        "proof",
        "runtime",
        "pipeline",
        "model",
        "debug",
        "tune",
        "kernels",
    },
    "__init__": {"api", "pipeline", "runtime", "policy", "kernels"},  # resolved on first use
    "__main__": {"api"},
    "ops": {"kernels"},
    "terms": set(),
    "errors": set(),
    # the rooms of kernels/
    "kernels.rule": set(),
    "kernels.errors": set(),
    "kernels.budget": {"kernels.rule"},
    "kernels.timing": {"kernels.rule"},
    "kernels.ranks": {"kernels.rule"},
    "kernels.choose": {"kernels"},  # imports the implementation that it chose
    "kernels.slots": {"kernels.rule"},
    "kernels.codecs": {"kernels.rule", "kernels.slots"},
    "kernels.choose_whole": {"kernels.select_slots", "kernels.codecs", "kernels.slots", "kernels.rank", *RULES},
    "kernels.join_slots": {"kernels.rule", "kernels.slots", "kernels.codecs"},
    "kernels.attention": {"kernels.rule", "kernels.slots"},
    "kernels.rank": {"kernels.slots", "kernels.attention", *RULES},
    "kernels.exits": {"kernels.slots", "kernels.attention", "kernels.rank", *RULES},
    "kernels.triton_shared": {"kernels.attention"},
    "kernels.native": set(),
    "kernels.select_slots": {"kernels.rule", "kernels.choose", "kernels.slots", "kernels.triton_shared"},
    "kernels.compact_slots": {"kernels.rule", "kernels.choose", "kernels.slots", "kernels.triton_shared"},
    "kernels.prefill_attend": {
        "kernels.rule",
        "kernels.choose",
        "kernels.attention",
        "kernels.triton_shared",
        "kernels.native",
    },
    "kernels.decode_attend": {
        "kernels.choose",
        "kernels.attention",
        "kernels.codecs",
        "kernels.exits",
        "kernels.slots",
        "kernels.rank",
        "kernels.triton_shared",
        "kernels.native",
        *RULES,
    },
    "kernels.after_call": {
        "kernels.attention",
        "kernels.codecs",
        "kernels.exits",
        "kernels.slots",
        "kernels.rank",
        "kernels.select_slots",
        "kernels.compact_slots",
        *RULES,
    },
    "kernels.testing": {"kernels.rule", "kernels.slots"},
    "kernels.compile_report": {"kernels"},
    "kernels": set(),
}
"""What each room may import, beside `terms` and the errors: never one that imports it, at any remove."""

LOADERS = {"kvpass/tune/loading.py"}
"""Of commands that are given a model by its name: the library itself knows no model library."""

ENVIRONMENT_READERS = {
    "kvpass/debug",
    "kernels/choose.py",
    "kernels/triton_shared/triton_launch.py",
    "kernels/native/library.py",  # the compiler's and Inductor's own
}


def name_of(file: Path) -> str:
    """`kvpass/graph/calls.py` is `match.calls`, `kernels/rule.py` is `kernels.rule`."""
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


def room_of(name: str) -> str:
    """`graph.calls` is in graph, `kernels.rank.scores` in kernels.rank, `patterns.sdpa` in patterns."""
    first, *more = name.split(".")
    return ".".join([first, *more[:1]]) if first == "kernels" else first


MODULES = {name_of(file): file for file in FILES}


def ours(file: Path) -> set[str]:
    """Modules of ours that a file imports, as `graph.calls`; `from kvpass.graph import calls` is one of them too."""
    found = {full.removeprefix("kvpass.") for full in imported(file) if full.startswith("kvpass.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in found} - {""}


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_follow_the_arrows(file: Path):
    room = room_of(name_of(file))
    assert room in ARROWS, f"{room} is new: say in ARROWS what it may import"
    free = {room, "terms", "errors", "kernels.errors", "__version__"}
    wrong = {name for name in ours(file) if not any(within(name, allowed) for allowed in ARROWS[room] | free)}
    assert not wrong, f"{room} may import {sorted(ARROWS[room])}"


def test_no_room_imports_one_above_it():
    graph = nx.DiGraph((room, room_of(to)) for room, below in ARROWS.items() for to in below if room_of(to) != room)
    graph.remove_nodes_from(
        ["kernels", "kernels.choose", "kernels.compile_report"]
    )  # their arrow is to all of kernels/
    assert not list(nx.simple_cycles(graph))


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, at any remove."""
    graph = nx.DiGraph((name, to) for name, below in arrows.items() for to in below if to != name)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_no_file_imports_one_that_imports_it():
    assert circles({name: ours(file) & set(MODULES) for name, file in MODULES.items()}) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_rooms_hold_all_files():
    loose = {file.stem for file in (ROOT / "kvpass").glob("*.py")}
    assert loose == LOOSE


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_foreign_imports(file: Path):
    tops = {full.split(".")[0] for full in imported(file)}
    assert not tops & {"tests", "examples"}
    assert "transformers" not in tops or ids(file) in LOADERS
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


def identifiers(node: ast.AST) -> set[str]:
    """What a piece of code names: variables, attributes, arguments, keywords."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return found | {n.arg for n in ast.walk(node) if isinstance(n, (ast.arg, ast.keyword)) and n.arg}


def test_no_function_names_all_state_tensors() -> None:
    """A state has the fields that its rule gives it: whoever spells them out leaves some behind."""
    from kvpass.kernels.slots.state import FIELDS

    everything = {field.name for field in FIELDS}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    naming = {
        f"{ids(file)}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, kinds) and any(everything <= group for group in spelled_together(node))
    }
    assert not naming


def spelled_together(function: ast.AST) -> Iterator[set[str]]:
    """Attributes that a function reads of one thing, and names that stand side by side in a tuple, a list or a call."""
    of: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            of.setdefault(ast.unparse(node.value), set()).add(node.attr)
        elif isinstance(node, (ast.Tuple, ast.List)):
            yield {n.id for n in node.elts if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Call):
            yield {n.id for n in node.args if isinstance(n, ast.Name)} | {k.arg for k in node.keywords if k.arg}
    yield from of.values()


def test_the_rule_knows_no_record() -> None:
    """Each feature's words stand in its own file; the rule and the code around a call name none of them."""
    from kvpass.kernels.rule import all_words

    assert not identifiers(tree(ROOT / "kernels/rule.py")) & set(all_words())
    assert "rule" not in identifiers(tree(ROOT / "kvpass/runtime/bind.py"))
