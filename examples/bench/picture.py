"""The picture of a run: steps against what bytes allow (a roofline), growth with context, the op's share of bandwidth.

Text only where a figure could be misread; kvpass blue, others grey.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.timing import quartiles

OURS, OTHERS, LIMIT = "tab:blue", "tab:gray", "black"


def draw(results: dict[str, Any], path: Path) -> bool:
    """Writes a PNG of the panels whose benchmarks were measured on the first device; False where there is none, or no
    matplotlib.
    """
    panels = [panel for name, make in PANELS.items() for panel in make(first(results, name))]
    if not panels:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(panels) // 2)
    wide = min(2, len(panels))
    figure, axes = plt.subplots(rows, wide, figsize=(8 * wide, 4.8 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    facts = results["machine"]
    figure.suptitle(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {results['date']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def first(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(iter(results["benchmarks"].get(name, {}).values()), {})


def decode(found: dict[str, Any]) -> list[Callable[[Any], None]]:
    return [lambda axis, r=result: _roofline(axis, r) for result in found.values()]


def _roofline(axis: Any, result: dict[str, Any]) -> None:
    """Steps by the bytes that they must read; the line is the read bandwidth."""
    most = 0.0
    for name, one in result["contenders"].items():
        if not one["kv_bytes"]:
            continue
        megabytes = (result["weight_bytes"] + one["kv_bytes"]) / 1e6
        middle = 1e3 * quartiles(one["step_s"])[1]
        most = max(most, megabytes)
        colour = OURS if name.startswith("kvpass") else OTHERS
        axis.plot(megabytes, middle, "o", color=colour)
        axis.annotate(name, (megabytes, middle), xytext=(4, 2), textcoords="offset points", fontsize=6)
    axis.plot([0, most], [0, 1e9 * most / result["read_bandwidth"]], color=LIMIT, linewidth=1)
    title = f"Decode, {result['context']:,} x {result['batch']}, {result['dtype']}: the line is read bandwidth"
    axis.set(title=title, xlabel="weights and KV, MB a step", ylabel="step, ms")
    axis.margins(x=0.15)


def growth(found: dict[str, Any]) -> list[Callable[[Any], None]]:
    return [lambda axis, r=result: _lengths(axis, r) for result in found.values()]


def _lengths(axis: Any, result: dict[str, Any]) -> None:
    for name, at in result["step_s"].items():
        lengths = sorted(map(int, at))
        times = [1e3 * quartiles(at[str(length)])[1] for length in lengths]
        axis.plot(lengths, times, "o-", color=OURS if name in result["held"] else OTHERS)
        axis.annotate(
            name, (lengths[-1], times[-1]), xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=8
        )
    axis.set_xscale("log", base=2)
    axis.set(
        title=f"Growth at {result['slots']:,} slots", xlabel="tokens of context", ylabel="step, ms", ylim=(0, None)
    )


def op_bandwidth(found: dict[str, Any]) -> list[Callable[[Any], None]]:
    return [lambda axis: _shares(axis, found)] if found else []


def _shares(axis: Any, found: dict[str, Any]) -> None:
    names, shares = [], []
    for case, result in found.items():
        for policy, one in result["found"].items():
            names.append(f"{policy}, {case}")
            shares.append(100 * one["live_bytes"] / quartiles(one["step_s"])[1] / result["read_bandwidth"])
    bars = axis.barh(names, shares, color=OURS)
    axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    axis.axvline(100, color=LIMIT, linewidth=1)
    axis.set(title="decode_attend: live bytes a second, % of read bandwidth")


PANELS: dict[str, Callable[[dict[str, Any]], list[Callable[[Any], None]]]] = {
    "decode": decode,
    "growth": growth,
    "op_bandwidth": op_bandwidth,
}
