"""From raw times to the table, the asked-for ratios, the files. Every figure is computed from one run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "contender",
    "decode ms (IQR)",
    "bound ms",
    "of bound",
    "prefill s",
    "KV MB",
    "read MB/step",
    "compile s",
    "tokens as HF",
)
DECODE_CASE = "2048x8"  # the one that issue 2 asks a decode ratio of
GRAPH_STAGES = ("scan", "plan", "lower")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def finish(results: dict[str, Any]) -> None:
    """Adds the derived figures: medians, bounds, ratios."""
    for case in results["cases"]:
        for found in case["contenders"].values():
            derive(found, case)
    results["asked"] = asked(results)


def derive(found: dict[str, Any], case: dict[str, Any]) -> None:
    low, middle, high = quartiles(found["step_s"])
    timed = found.get("prefill_s", [])
    moved = case["weight_bytes"] + found["kv_bytes"]
    found |= {
        "decode_ms": 1e3 * middle,
        "decode_iqr_ms": 1e3 * (high - low),
        "prefill_median_s": statistics.median(timed or [found["prefill_net_s"]]),
        "prefill_calls": len(timed),
        "moved_bytes": moved,
        "bound_ms": 1e3 * moved / case["read_bandwidth"],
    }


def rivals(case: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    """Hugging Face's contenders with this inner compiler."""
    return [
        found
        for found in case["contenders"].values()
        if found["spec"]["policy"] is None and found["spec"]["inner"] == inner
    ]


def policies(case: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    return [found for found in case["contenders"].values() if found["spec"]["policy"] == policy]


def line(what: str, value: float, target: float | None, *, least: bool, unit: str = "x") -> dict[str, Any]:
    """A figure beside its target; without one it only shows the trend."""
    ok = None if target is None else value >= target if least else value <= target
    return {"what": what, "value": value, "target": target, "least": least, "unit": unit, "ok": ok}


def decode_lines(case: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for found in [*policies(case, "h2o"), *policies(case, "ada_snapkv")]:
        inner, policy = found["spec"]["inner"], found["spec"]["policy"]
        against = [rival["decode_ms"] for rival in rivals(case, inner)]
        if against:
            what = f"{case['name']}: decode, {policy} 20 % against the fastest full HF cache, inner {inner}"
            target = 1.8 if case["name"] == DECODE_CASE and policy == "h2o" else None
            out.append(line(what, min(against) / found["decode_ms"], target, least=True))
    return out


def prefill_lines(case: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for policy, target in (("knorm", None), ("snapkv", 1.1), ("h2o", 1.6)):
        for found in policies(case, policy):
            inner = found["spec"]["inner"]
            against = [rival["prefill_median_s"] for rival in rivals(case, inner)]
            if against:
                what = f"{case['name']}: prefill, {policy} against the fastest of HF, inner {inner}"
                out.append(line(what, found["prefill_median_s"] / min(against), target, least=False))
    return out


def stage_lines(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Scan, plan and lower as a share of Dynamo's capture time: the worst contender of the case."""
    shares = []
    for found in case["contenders"].values():
        if found["timings_s"]:
            spent = sum(found["timings_s"].get(stage, 0.0) for stage in GRAPH_STAGES)
            shares.append(spent / found["capture_s"])
    what = f"{case['name']}: scan + plan + lower, of capture"
    return [line(what, 100 * max(shares), 5, least=False, unit=" %")] if shares else []


def asked(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What issue 2 asks for, and what this run gave."""
    out = [line("import kvpass, beyond torch", 1e3 * results["import_s"], 100, least=False, unit=" ms")]
    for case in results["cases"]:
        out += decode_lines(case) + prefill_lines(case) + stage_lines(case)
    return out


def cells(name: str, found: dict[str, Any]) -> list[str]:
    mark = "" if found["prefill_calls"] else " *"
    return [
        name,
        f"{found['decode_ms']:.1f} ({found['decode_iqr_ms']:.1f})",
        f"{found['bound_ms']:.1f}",
        f"{found['decode_ms'] / found['bound_ms']:.1f}x",
        f"{found['prefill_median_s']:.2f}{mark}",
        f"{found['kv_bytes'] / 1e6:.1f}",
        f"{found['moved_bytes'] / 1e6:.0f}",
        f"{found['compile_s']:.0f}",
        f"{found['same_tokens']:.0%}",
    ]


def asked_cells(entry: dict[str, Any]) -> list[str]:
    value = f"{entry['value']:.2f}{entry['unit']}"
    if entry["target"] is None:
        return [entry["what"], value, "-", "-"]
    sign = ">=" if entry["least"] else "<="
    return [entry["what"], value, f"{sign} {entry['target']:g}{entry['unit']}", "yes" if entry["ok"] else "NO"]


ASKED_COLUMNS = ("figure", "here", "asked", "reached")


def title(case: dict[str, Any]) -> str:
    return f"{case['context']:,} tokens x batch {case['batch']}, float32, {case['rounds']} rounds"


def grids(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(title, columns, rows) of every table."""
    out = [
        (title(case), COLUMNS, [cells(name, found) for name, found in case["contenders"].items()])
        for case in results["cases"]
    ]
    return [*out, ("Asked for", ASKED_COLUMNS, [asked_cells(entry) for entry in results["asked"]])]


def show(results: dict[str, Any], console: Console) -> None:
    for heading, columns, rows in grids(results):
        shown = Table(title=heading)
        for index, column in enumerate(columns):
            shown.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def notes(results: dict[str, Any]) -> list[str]:
    bandwidths = ", ".join(f"{case['read_bandwidth'] / 1e9:.1f}" for case in results["cases"])
    peaks = ", ".join(f"{case['peak_bytes'] / 1e9:.1f}" for case in results["cases"])
    late = [
        name
        for case in results["cases"]
        for name, found in case["contenders"].items()
        if found["compiled_while_timing"]
    ]
    return [
        "decode: median of one step, interquartile range in brackets; contenders take turns.",
        f"bound: weights and live KV read once, at the read bandwidth measured before ({bandwidths} GB/s).",
        "prefill: median of the timed calls after the first; * the first call, less its compile time.",
        "KV MB: keys and values held after the last step (HF static: its whole length).",
        "tokens as HF: greedy tokens equal to the first contender's; a full cache should give 100 %.",
        f"peak memory of each case's process, with all its contenders: {peaks} GB.",
        *([f"something was compiled while decoding was timed: {sorted(set(late))}"] if late else []),
    ]


def markdown(results: dict[str, Any]) -> str:
    took = f"`{results['command']}`, {results['took_s'] / 60:.0f} minutes"
    lines = [f"# kvpass benchmark, {results['date']}", "", took, ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    for heading, columns, rows in grids(results):
        lines += ["", f"## {heading}", "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results)), ""])


def picture(results: dict[str, Any], path: Path) -> None:
    """Decode, prefill and KV bytes as bars, a row of panels per case; a black tick is the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("decode_ms", "decode step, ms"),
        ("prefill_median_s", "prefill, s"),
        ("kv_bytes", "KV held, MB"),
    )
    count = len(results["cases"])
    figure, axes = plt.subplots(count, 3, figsize=(15, 0.8 + 3.2 * count), squeeze=False, layout="constrained")
    for row, case in zip(axes, results["cases"], strict=True):
        names, found = list(case["contenders"]), list(case["contenders"].values())
        colours = ["tab:gray" if f["spec"]["policy"] is None else "tab:blue" for f in found]
        for axis, (key, label) in zip(row, panels, strict=True):
            scale = 1e-6 if key == "kv_bytes" else 1
            bars = axis.barh(names, [f[key] * scale for f in found], color=colours)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axis.set(title=f"{case['name']}: {label}", yticks=range(len(names)))
            axis.set_yticklabels(names if key == "decode_ms" else [""] * len(names))
            axis.invert_yaxis()
            axis.margins(x=0.15)
        row[0].plot([f["bound_ms"] for f in found], range(len(names)), "k|", markersize=14, markeredgewidth=2)
    facts = results["machine"]
    figure.suptitle(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {results['date']}")
    figure.savefig(path, dpi=110)


def write(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{end}" for end in ("md", "json", "png")]
    paths[0].write_text(markdown(results))
    paths[1].write_text(json.dumps(results, indent=1) + "\n")
    picture(results, paths[2])
    return paths
