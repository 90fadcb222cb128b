"""A report for people: 100 columns, one line for each run of equal rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

WIDTH = 100


def report_text(data: dict[str, Any]) -> str:
    """The headline, what it adds up from, the compressed layers, the dense ones and why they are."""
    parts = _headline(data), _spans(data["spans"]), _sites(data["sites"]), _dense(data["dense"])
    return "\n".join([*(line for part in parts for line in part), *_declined(data["declined"])])


def _headline(d: dict[str, Any]) -> list[str]:
    share = d["bytes"] / d["dense_bytes"] if d["dense_bytes"] else 0.0
    after = f", after {d['tokens']} tokens" if d["tokens"] is not None else ""
    held = f"{size(d['bytes'])} of {size(d['dense_bytes'])} dense KV ({share:.1%})"
    part = f", {d['part']} (its heads alone)" if d["part"] else ""
    lines = _folded(f"policy {d['policy']}, budget {d['budget']}{part}: {held}{after}", "")
    if not d["sites"]:
        return [*lines, *_folded("nothing in this cache is compressed: all of it was left dense")]
    left = sum(row["bytes"] for row in d["dense"])
    parts = [f"{size(d['slot_bytes'])} in slots"]
    parts += [f"{size(left)} left dense"] if left else []
    parts += [f"{size(d['caller_bytes'])} in full-length buffers that only the caller can free"] * bool(
        d["caller_bytes"]
    )
    bits = f": {d['bits']:.2f} bits for each number kept, all counted" if d["coded"] and d["bits"] else ""
    lines += _folded(f"{', '.join(parts)}; plus {size(d['overhead_bytes'])} of positions and statistics{bits}")
    lines += _folded(d["why"]) if d["why"] else []
    return (
        lines
        + _folded(_proof(d["proof"]))
        + (_folded(_steps(d["steps"])) if any(d["steps"].values()) else [])
        + [line for kind, name in d["providers"].items() for line in _folded(f"attention by {name}: {kind}")]
    )


def _proof(p: dict[str, int]) -> str:
    demoted = f", {p['demoted']} demoted" if "demoted" in p else ""
    gone = f"{p['evicted']} of {p['seen']} keys evicted{demoted}, {size(p['freed'])} freed"
    return f"proof: {_times(p['calls'], 'call')}, {gone}, {_times(p['outside'], 'step')} outside the graph"


def _steps(s: dict[str, Any]) -> str:
    eager = f", {s['eager']} eager (the last: {s['why']})" if s["eager"] else ""
    return f"steps: {s['replays']} replayed from {_times(s['captures'], 'CUDA graph')}{eager}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _spans(rows: Sequence[dict[str, Any]]) -> list[str]:
    several = any(row["row"] for row in rows)
    return [line for row in rows for line in _folded(span_text(row, several))]


def span_text(s: dict[str, Any], several: bool) -> str:
    """several: whether to say whose it is."""
    whose = f" of row {s['row']}" if several else ""
    gone = "GONE IN ALL HEADS" if s["lost"] else f"{s['gone'] or 'none'} gone in all heads"
    where = f"{_times(s['tokens'], 'token')} at {s['start']}..{s['stop'] - 1}"
    return f"span {s['span']}{whose}: {where}, {s['kept']:.1%} kept over {_times(s['heads'], 'head')}; {gone}"


def _sites(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for neighbours that differ in their layer only."""
    if not rows:
        return []
    lines = [f"  {'layers':>9} {'slots':>7} {'live':>11} {'KV':>10} {'dense':>10}  site"]
    for _, run in groupby(rows, lambda row: {**row, "site": "", "layer": 0}):
        lines.append(_site_line(list(run)))
    return lines


def _site_line(run: list[dict[str, Any]]) -> str:
    s, last = run[0], run[-1]
    live = f"{s['live_min']}..{s['live_max']}" if s["live_min"] != s["live_max"] else str(s["live_max"])
    layers = f"{s['layer']}-{last['layer']}" if last["layer"] > s["layer"] else f"{s['layer']}"
    sizes = f"{size(s['bytes']):>10} {size(s['dense_bytes']):>10}"
    each = " each" if len(run) > 1 else ""
    return _cut(f"  {layers:>9} {s['slots']:>7} {live:>11} {sizes}  {_run_name([r['site'] for r in run])}{each}")


def _dense(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for (shape, held), run in groupby(rows, lambda row: (row["shape"], row["bytes"])):
        places = [row["place"] for row in run]
        each = " each" if len(places) > 1 else ""
        lines.append(_cut(f"  dense {_run_name(places)}: {size(held)}{each}, {shape}"))
    return lines


def _declined(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sites with one reason in one paragraph."""
    lines = []
    for (reason, hint), run in groupby(rows, lambda row: (row["reason"], row["hint"])):
        some = list(run)
        first = some[0]
        text = f"left dense {_run_name([row['site'] for row in some])}: {reason} at {first['node']} ({first['source']})"
        lines += _folded(f"{text}; {hint}")
    return lines


def _run_name(names: list[str]) -> str:
    """`layers.0-29.attn` of `layers.0.attn` .. `layers.29.attn`; of other names the first and the last."""
    first, last = names[0], names[-1]
    if first == last:
        return first
    one, two = re.split(r"(\d+)", first), re.split(r"(\d+)", last)
    differ = [at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) == len(two) and len(differ) == 1 and differ[0] % 2:
        at = differ[0]
        if int(two[at]) - int(one[at]) == len(names) - 1:
            return "".join([*one[:at], f"{one[at]}-{two[at]}", *one[at + 1 :]])
    return ", ".join(names) if len(names) < 3 else f"{first} .. {last} ({len(names)})"


def _folded(text: str, indent: str = "  ") -> list[str]:
    return wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
