"""From the results of a run to what is shown: tables, aims, files, the figures in docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import picture
from bench.suite import Aim, Grid, module_of

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- made by make bench -->", "<!-- end -->"
AIM_COLUMNS = ("figure", "here", "aim", "verdict")


def parts(results: dict[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(name, device, module, its results) of each benchmark that was measured."""
    for name, by_device in results["benchmarks"].items():
        for device, found in by_device.items():
            yield name, device, module_of(name), found


def grids(results: dict[str, Any]) -> list[Grid]:
    """All tables, the aims last."""
    out = []
    for _, device, module, found in parts(results):
        for grid in module.grids(found):
            title = grid.title if device == "cpu" else f"{grid.title}, on {device}"
            out.append(Grid(title, grid.columns, grid.rows, grid.note))
    return [*out, Grid("Aims", AIM_COLUMNS, [cells(aim) for aim in aims(results)])]


def aims(results: dict[str, Any]) -> list[Aim]:
    """Figures beside what is aimed at; what a GPU gives is shown, the aims are a CPU's."""
    return [
        aim if device == "cpu" else replace(aim, what=f"{aim.what}, on {device}", aim=None)
        for _, device, module, found in parts(results)
        for aim in module.aims(found)
    ]


def cells(aim: Aim) -> list[str]:
    value = f"{aim.value:.0%}" if aim.unit == "" and 0 < aim.value < 1 else f"{aim.value:.3g}{aim.unit}"
    sign = ">=" if aim.least else "<="
    asked = "-" if aim.aim is None else f"{sign} {aim.aim:g}{aim.unit}"
    return [aim.what, value, asked, aim.verdict]


def show(results: dict[str, Any], console: Console) -> None:
    for grid in grids(results):
        shown = Table(title=grid.title, caption=grid.note or None)
        for index, column in enumerate(grid.columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in grid.rows:
            shown.add_row(*row)
        console.print(shown)
    asked = [aim for aim in aims(results) if aim.aim is not None]
    console.print(f"{sum(bool(aim.reached) for aim in asked)} of {len(asked)} aims reached", highlight=False)


def lines_of(grid: Grid, level: str = "##") -> list[str]:
    """A table as Markdown."""
    lines = [
        "",
        f"{level} {grid.title}",
        "",
        "| " + " | ".join(grid.columns) + " |",
        "| --- " * len(grid.columns) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in grid.rows]
    return [*lines, *(["", grid.note] if grid.note else [])]


def told(results: dict[str, Any]) -> str:
    """What was measured, where and by which command; a sentence."""
    facts, seconds = results["machine"], sum(done["took_s"] for *_, found in parts(results) for done in found.values())
    return (
        f"`{results['command']}`, {results['date']}, commit {results['commit'] or 'unknown'}, {seconds / 60:.0f} min "
        f"of measuring: {facts['cpu']} ({facts['capability']}), {facts['threads']} threads, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, Python {facts['python']}."
    )


def markdown(results: dict[str, Any]) -> str:
    head = [f"# kvpass benchmarks, {results['date']}", "", told(results)]
    others = sorted({one["peer"] for one in contenders(results) if "peer" in one})
    head += ["", f"In environments of their own: {'; '.join(others)}."] if others else []
    return "\n".join([*head, *(line for grid in grids(results) for line in lines_of(grid)), ""])


def contenders(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for done in results["benchmarks"].get("decode", {}).values():
        for result in done.values():
            yield from result["contenders"].values()


def write(results: dict[str, Any], folder: Path, name: str, whole: bool) -> list[Path]:
    """The files of a run; `whole`: all benchmarks in earnest, so that docs/performance.md shows its figures too."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{end}" for end in ("md", "json", "png")]
    paths[0].write_text(markdown(results))
    paths[1].write_text(json.dumps({**results, "aims": [aim.to_dict() for aim in aims(results)]}, indent=1) + "\n")
    drawn = picture.draw(results, paths[2])
    if whole:
        write_page(results, paths[2])
        paths.append(PAGE)
    return paths if drawn else [path for path in paths if path.suffix != ".png"]


def write_page(results: dict[str, Any], drawing: Path) -> None:
    """The figures between the marks of docs/performance.md and of README.md."""
    link = drawing.resolve().relative_to(ROOT) if drawing.resolve().is_relative_to(ROOT) else drawing
    shown = [line for grid in grids(results)[::-1] for line in lines_of(grid, "###")]  # the aims first
    _between(PAGE, [told(results), "", f"![roofline and scaling](../{link})", *shown])
    _between(README, [told(results), *short(results)])


def _between(page: Path, lines: list[str]) -> None:
    before, rest = page.read_text().split(BEGIN, 1)
    page.write_text("\n".join([before + BEGIN, *lines, END + rest.split(END, 1)[1]]))


def short(results: dict[str, Any]) -> list[str]:
    """Decode steps and prompts in one table, and what bytes allow beside them: `side_by_side`."""
    decode, prefill = module_of("decode"), module_of("prefill")
    lines = ["", "| context x batch | | time | what bytes allow | KV held |", "| --- | --- | --- | --- | --- |"]
    for result in _of(results, "decode"):
        title = f"{result['context']:,} x {result['batch']}, a step"
        title += "" if result["dtype"] == "float32" else f", {result['dtype']}"
        for name, one in side_by_side(result["contenders"], decode.middle):
            least = f"{1e3 * decode.bound(one, result):.1f} ms" if one["kv_bytes"] else ""
            held = f"{one['kv_bytes'] / 1e6:.0f} MB" if one["kv_bytes"] else ""
            lines.append(f"| {title} | {name} | {1e3 * decode.middle(one):.1f} ms | {least} | {held} |")
    for result in _of(results, "prefill"):
        title = f"{result['context']:,} x {result['batch']}, the prompt"
        for name, one in side_by_side(result["contenders"], prefill.middle):
            lines.append(f"| {title} | {name} | {prefill.middle(one):.1f} s | | {one['kv_bytes'] / 1e6:.0f} MB |")
    return [*lines, ""]


def _of(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What a benchmark found, on the first device that it was measured on."""
    return [*next(iter(results["benchmarks"].get(name, {}).values()), {}).values()]


def side_by_side(
    everybody: dict[str, Any], seconds: Callable[[dict[str, Any]], float]
) -> list[tuple[str, dict[str, Any]]]:
    """The fastest of Hugging Face's full caches, ours under the same inner options, and what others made."""

    def under(one: dict[str, Any]) -> Any:
        return one["spec"]["inner"], one["spec"].get("options")

    own = [one for one in everybody.values() if "spec" in one]
    best = min((one for one in own if one["spec"]["policy"] is None), key=seconds, default=None)
    return [
        (name, one)
        for name, one in everybody.items()
        if one is best
        or ("spec" in one and one["spec"]["policy"] is not None and (best is None or under(one) == under(best)))
        or ("peer" in one and not name.startswith("HF"))
    ]
