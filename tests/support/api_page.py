"""`make api`: docs/api.md, from the docstrings of what users import.

    python -P tests/support/api_page.py           # writes the page
    python -P tests/support/api_page.py --check   # says what is not documented

A name's signature, summary, arguments, attributes, methods and errors; of attributes also type and default.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
HEAD = """# API reference

Made from the docstrings by `make api`; a test says when it is out of date. Shapes are in the letters of
[concepts.md](concepts.md#words): `B` sequences, `Hq` query heads, `Hkv` KV heads, `G` query heads of a group, `S`
queries of a call, `T` tokens, `L` keys seen, `C` slots, `D` and `Dv` entries of a key and a value. Sizes are in bytes,
times in seconds. Policy files have a page of their own: [policy-files.md](policy-files.md).
"""
SECTIONS: dict[str, list[tuple[str, str]]] = {
    "Compile": [
        ("kvpass", "compile"),
        ("kvpass", "backend"),
        ("kvpass.pipeline.compose", "Backend"),
        ("kvpass.pipeline.graphs", "Graphs"),
        ("kvpass.pipeline.graphs", "GraphRecord"),
        ("kvpass", "explain"),
        ("kvpass.api.explain", "Explanation"),
    ],
    "Look at a cache": [
        ("kvpass", "report"),
        ("kvpass.api.report", "Report"),
        ("kvpass", "inspect"),
        ("kvpass", "page"),
        ("kvpass", "Cache"),
        ("kvpass.api.live_slots", "Inspection"),
        ("kvpass.api.live_slots", "LayerView"),
        ("kvpass", "tentative"),
    ],
    "Policies": [
        ("kvpass", "Policy"), ("kvpass", "marked"), ("kvpass", "replay"), ("kvpass", "instructed"),
        ("kvpass", "scorer"), ("kvpass", "Seen"),
    ],
    "Exported programs": [("kvpass", "rewrite"), ("kvpass.api.rewrite", "Rewritten"), ("kvpass", "export_mlir")],
    "Patterns": [
        ("kvpass.patterns", name)
        for name in (
            "PatternSet", "CorePattern", "UpdatePattern", "RefusedPattern", "Expansion", "Core", "Update", "Term",
            "Axes", "MaskKind", "CacheForm", "Miss", "Flow", "argument", "operand", "call_name", "shape_of",
            "check_operands", "mask_terms",
        )
    ],
    "Kernels": [("kvpass.kernels.choose", "use")],
    "Errors": [("kvpass", "KVPassError"), ("kvpass.errors", "NothingRewritten"), ("kvpass", "Reason")],
}  # fmt: skip
INTRODUCTIONS = {
    "Policies": "`kvpass.Policy` is what a policy file says, as frozen data; "
    "[policy-files.md](policy-files.md#the-fields) has every field, those of its parts too.",
    "Patterns": "Everything here is in `kvpass.patterns`, with `DEFAULT`, the set that is used if none is given. "
    "[patterns.md](patterns.md) says how to write one.",
}
ELSEWHERE = {"__version__"}
"""Names of kvpass.__all__ that are no functions or classes."""

PARTS = ("Args", "Attributes", "Raises", "Warns")
"""Sections of a docstring that are lists."""


def page() -> str:
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        if title in INTRODUCTIONS:
            parts.append(f"{INTRODUCTIONS[title]}\n")
        parts += [entry(module, name) for module, name in names]
    parts.append(tail())
    return "".join(parts)


def tail() -> str:
    """The tree of errors, as its module draws it, and the codes with their hints."""
    from kvpass import errors

    tree = (errors.__doc__ or "").split("\n\n")[1]
    rows = [f"| `{r.value}` | {'yes' if r.by_choice else ''} | {r.hint} |" for r in errors.Reason]
    heads = "| code | dense by choice | what to do |\n| --- | --- | --- |\n"
    drawn = f"\nThe tree, in `kvpass.errors`:\n```text\n{tree.strip()}\n```\n"
    return f"{drawn}\nThe codes:\n\n{heads}" + "\n".join(rows) + "\n"


def entry(module: str, name: str) -> str:
    thing = getattr(import_module(module), name)
    text, lists = read_all(thing)
    lines = [f"\n### {module}.{name}\n", *signature_lines(thing, name), f"\n{text}\n"]
    tables = {part: "".join(rows_of(thing, lists.get(part, {}), part)) for part in ("Args", "Attributes")}
    lines += [f"\n| {part[:-1].lower()} | |\n| --- | --- |\n{rows}" for part, rows in tables.items() if rows]
    lines += [method for key, method in methods(thing) if key not in lists.get("Attributes", {})]
    for part in ("Raises", "Warns"):
        if told := lists.get(part):
            lines.append(f"\n{part}:\n" + "".join(f"* {names(key)}: {about}\n" for key, about in told.items()))
    return "".join(lines)


def rows_of(thing: Any, told: dict[str, str], part: str) -> list[str]:
    """A row for each argument or field; several that share a text share a row."""
    facts = field_facts(thing) if part == "Attributes" else {}

    def row(key: str, about: str) -> str:
        kinds = dict.fromkeys(facts[name] for name in key.split(", ") if name in facts)
        return f"| {names(key)} | {about}{''.join(f' ({kind})' for kind in kinds)} |\n"

    return [row(key, about) for key, about in told.items()]


def field_facts(thing: Any) -> dict[str, str]:
    """Type and default of each field of a dataclass."""
    found = {}
    for field in fields(thing) if is_dataclass(thing) else ():
        default = "" if field.default is MISSING else f", {field.default!r}"
        found[field.name] = f"`{field.type}{default}`".replace("|", "or")
    return found


def names(key: str) -> str:
    return ", ".join(f"`{name}`" for name in key.split(", "))


def methods(thing: Any) -> Iterator[tuple[str, str]]:
    """Public methods and properties, but those of enums' and dataclasses' making, with their text."""
    found = {name: member for kind in reversed(ours(thing)) for name, member in vars(kind).items()}
    for name, member in found.items():
        shown = isinstance(member, (property, staticmethod, cached_property)) or inspect.isfunction(member)
        if name.startswith("_") or not shown:
            continue
        call = getattr(member, "__func__", member)
        told, lists = read(getattr(member, "__doc__", "") or "")
        written = f"{name}{signature(call, skip=not isinstance(member, staticmethod))}" if callable(call) else name
        more = [f"{names(key)}: {about}" for part in PARTS[:2] for key, about in lists.get(part, {}).items()]
        more += [f"raises {names(key)}: {about}" for key, about in lists.get("Raises", {}).items()]
        text = " ".join(told.split())
        yield name, f"\n`.{written}`: {text}\n" + "".join(f"* {line}\n" for line in more)


def signature_lines(thing: Any, name: str) -> list[str]:
    if inspect.isclass(thing):
        return []
    call = getattr(thing, "__wrapped__", thing)
    flat = f"{name}{signature(call)}"
    if len(flat) > 110:
        flat = flat.replace("(", "(\n    ", 1)
        before, after = flat.rsplit(") ->", 1)
        flat = re.sub(r", (?=\*?\*?\w+:|\*,|\*)", ",\n    ", before) + f"\n) ->{after}"
    return [f"```text\n{flat}\n```\n"]


def signature(call: Any, skip: bool = False) -> str:
    """As in the source, where annotations are words."""
    found = inspect.signature(call)
    parameters = list(found.parameters.values())[1 if skip else 0 :]
    text = str(found.replace(parameters=parameters))
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def ours(thing: Any) -> list[type]:
    """A class and those of its bases that are kvpass' own: what they say of fields and methods is said of it."""
    kinds = thing.__mro__ if inspect.isclass(thing) else ()
    return [kind for kind in kinds if kind is thing or kind.__module__.startswith("kvpass.policy.")]


def read_all(thing: Any) -> tuple[str, dict[str, dict[str, str]]]:
    """The prose of a thing's docstring, and the entries of its lists, or of its bases' where it has none."""
    text, lists = read(thing.__doc__ or "")
    for kind in ours(thing)[1:]:
        lists = read(kind.__doc__ or "")[1] | lists
    return text, lists


def read(doc: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The prose of a docstring, and the entries of its lists."""
    prose: list[str] = []
    lists: dict[str, dict[str, str]] = {}
    at, key = "", ""
    for line in inspect.cleandoc(doc).splitlines():
        if line.endswith(":") and line[:-1] in PARTS:
            at, key = line[:-1], ""
            lists[at] = {}
        elif at and (line.startswith("    ") or not line):
            opens = re.match(r"    (\*{0,2}\w[\w, *]*): (.*)", line)
            if opens:
                key = opens[1]
                lists[at][key] = opens[2]
            elif line.strip():
                lists[at][key] += f" {line.strip()}"
        else:
            at = ""
            prose.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip(), lists


def undocumented() -> list[str]:
    """Arguments, fields and methods of the page that no docstring says a word of."""
    found = []
    for module, name in (pair for pairs in SECTIONS.values() for pair in pairs):
        thing = getattr(import_module(module), name)
        text, lists = read_all(thing)
        told = {key for part in lists.values() for keys in part for key in keys.split(", ")}
        wanted = list(field_facts(thing))
        if not inspect.isclass(thing):
            wanted = list(inspect.signature(getattr(thing, "__wrapped__", thing)).parameters)
            helper = module == "kvpass.patterns" and "Args" not in lists  # the summary is enough
            wanted = [] if helper or "Arguments as for" in text else wanted
        found += [f"{module}.{name}: {word}" for word in wanted if word not in told and f"`{word}`" not in text]
        found += [f"{module}.{name}: no docstring"] if not text else []
        silent = [key for key, said in methods(thing) if said.endswith("`: \n") and key not in told]
        found += [f"{module}.{name}.{key}: no docstring" for key in silent]
    return found


def main() -> None:
    if "--check" in sys.argv:
        raise SystemExit("\n".join(undocumented()))
    PAGE.write_text(page())
    print(f"{PAGE}: {len(page().splitlines())} lines")


if __name__ == "__main__":
    main()
