"""index.html of a debug report: one self-contained page, everything escaped, newest run first."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

STAGES = {
    "01": "captured",
    "02": "sites",
    "03": "plan",
    "04": "rewritten",
    "05": "diffs",
    "06": "one layer",
    "07": "inner compiler",
}
"""Stage numbers of file names, in words."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fafaf7 }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem } h3 { margin: 0 0 .4rem; font-size: 1.05rem }
section { background: #fff; border: 1px solid #e3e3dc; border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0 }
.facts { color: #666; font-size: .88rem } .facts b { color: #333; font-weight: 600 }
.stages { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; padding: 0; list-style: none; margin: .7rem 0 }
.stages b { color: #d93a2b; font-weight: 600; margin-right: .3rem }
a { color: #2c5d94; text-decoration: none } a:hover { text-decoration: underline }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; display: block; overflow-x: auto }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; vertical-align: top }
th { color: #888; font-weight: 500 } .note { color: #9c2117 }
figure { margin: .8rem 0; overflow-x: auto } img { max-width: 100% }
pre { font-size: .8rem; line-height: 1.35; overflow-x: auto; background: #f7f7f3; padding: .7rem; border-radius: 6px }
.add { color: #1e7b34 } .del { color: #b32010 } .at { color: #7a5da8 }
details { margin: .4rem 0 } summary { cursor: pointer; color: #555 }
"""


NO_PAGES: Mapping[Path, str] = MappingProxyType({})


def index(root: Path, runs: Iterable[Any], caches: Mapping[Path, str] = NO_PAGES) -> str:
    """The whole page.

    Args:
        root: folder of the report; links are relative to it.
        runs: `report.Run`s, oldest first.
        caches: pages about caches below root, with their titles.
    """
    body = "".join(_run(root, run) for run in reversed(list(runs)) if run.entries)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>kvpass debug report</title>'
        f"<style>{STYLE}</style></head><body><h1>kvpass debug report</h1>"
        "<p>Every captured graph in the order of compilation. Read a graph from left to right: what Dynamo captured, "
        "which attention sites were found in it, what was decided, the rewritten graph, and what changed.</p>"
        f"{_caches(root, caches)}{body}</body></html>\n"
    )


def _caches(root: Path, caches: Mapping[Path, str]) -> str:
    """Links to pages; how to make one where there is none."""
    if not caches:
        call = f"kvpass.page(cache, tokens, {str(root / 'cache.html')!r})"
        return f"<p>Which tokens a cache of these graphs holds: <code>{_esc(call)}</code> is linked here.</p>"
    links = "".join(
        f'<li><a href="{quote(path.relative_to(root).as_posix())}">{_esc(path.name)}</a> {_esc(title)}</li>'
        for path, title in caches.items()
    )
    return f"<p>Which tokens caches hold:</p><ul>{links}</ul>"


def _run(root: Path, run: Any) -> str:
    return f"<h2>{_esc(run.title)}</h2>" + "".join(_graph(root, entry) for entry in run.entries)


def _graph(root: Path, entry: Any) -> str:
    return (
        f'<section id="{_esc(entry.name)}"><h3>{_esc(entry.title)}</h3>{_facts(entry.facts)}{_links(entry)}'
        f"{_notes(entry)}{_sites(entry.sites)}{_steps(entry)}{_declined(entry.declined)}"
        f"{_diff(root, entry)}{_drawings(entry)}</section>"
    )


def _facts(facts: dict[str, str]) -> str:
    return (
        '<div class="facts">'
        + " · ".join(f"{_esc(name)} <b>{_esc(value)}</b>" for name, value in facts.items())
        + "</div>"
    )


def _links(entry: Any) -> str:
    items = []
    for number, title in STAGES.items():
        files = [name for name in entry.files if name.startswith(number)]
        if files:
            rest = "".join(f" {_link(entry.name, name, str(at))}" for at, name in enumerate(files[3:], 4))
            shown = ", ".join(_link(entry.name, name, name) for name in files[:3])
            items.append(f"<li><b>{number}</b>{_esc(title)}: {shown}{rest}</li>")
    return f'<ul class="stages">{"".join(items)}</ul>'


def _link(folder: str, name: str, text: str) -> str:
    return f'<a href="{_esc(folder)}/{_esc(name)}" title="{_esc(name)}">{_esc(text)}</a>'


def _notes(entry: Any) -> str:
    return "".join(f'<p class="note">{_esc(note)}</p>' for note in entry.notes)


def _sites(sites: list[dict[str, Any]]) -> str:
    if not sites:
        return ""
    columns = ("layer", "site", "phase", "update", "layout", "dtype", "mask", "source")
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join("<tr>" + "".join(f"<td>{_esc(site[name])}</td>" for name in columns) + "</tr>" for site in sites)
    return (
        f"<details{_open(sites)}><summary>{len(sites)} site(s)</summary><table><tr>{head}</tr>{rows}</table></details>"
    )


def _steps(entry: Any) -> str:
    """What the plan does outside of the graph, as it runs."""
    if not entry.steps:
        return ""
    columns = ("moment", "step", "about")
    rows = ((*(step[name] for name in columns), f"{len(step['sites'])} of {len(entry.sites)}") for step in entry.steps)
    head = "<th>outside of the graph</th><th>step</th><th>what it does</th><th>sites</th>"
    cells = "".join("<tr>" + "".join(f"<td>{_esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{cells}</table>"


def _declined(declined: list[dict[str, Any]]) -> str:
    if not declined:
        return ""
    rows = "".join(
        f"<tr><td>{_esc(d['site'])}</td><td>{_esc(d['reason'])}</td><td>{_esc(d['detail'])}</td><td>{_esc(d['source'])}</td>"
        f"<td>{_esc(d['hint'])}</td></tr>"
        for d in declined
    )
    head = "<tr><th>declined</th><th>reason</th><th>detail</th><th>source</th><th>what to do</th></tr>"
    return f"<table>{head}{rows}</table>"


def _open(rows: list[Any]) -> str:
    return " open" if len(rows) <= 4 else ""


def _diff(root: Path, entry: Any) -> str:
    """The first site's diff; the others look alike and are linked."""
    first = next((name for name in entry.files if name.startswith("05")), None)
    if first is None:
        return ""
    lines = (root / entry.name / first).read_text().splitlines()
    text = "\n".join(f'<span class="{_kind(line)}">{_esc(line)}</span>' for line in lines)
    return f"<details><summary>{_esc(first)}</summary><pre>{text}</pre></details>"


def _kind(line: str) -> str:
    if line.startswith("@@"):
        return "at"
    return {"+": "add", "-": "del"}.get(line[:1], "same")


def _drawings(entry: Any) -> str:
    names = [name for name in entry.files if name.endswith(".svg")]
    figures = "".join(f'<figure><img src="{_esc(entry.name)}/{_esc(n)}" alt="{_esc(n)}"></figure>' for n in names)
    return f"<details><summary>one layer, before and after</summary>{figures}</details>" if names else ""


def _esc(value: Any) -> str:
    return html.escape(str(value))
