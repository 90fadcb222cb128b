"""Scan, plan and lower of 100 layers: what kvpass adds to Dynamo's own work for one graph of a step.

The graph is captured once, by a backend that keeps it; then each stage is run on it several times.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import calculate_time_spent
from workers import say

from bench.deep_models import LAYERS, MODELS
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import without_gc

MINUTES = 1
STAGES = ("scan", "plan", "lower")


def jobs(options: Options) -> list[Job]:
    if options.device != "cpu":  # it runs on the host alone
        return []
    return [{"name": "layers", "layers": 6 if options.quick else LAYERS, "rounds": options.rounds_or(5, 3)}]


def work(job: Job, save: Save) -> dict[str, Any]:
    with without_gc():  # a collection walks over all that torch keeps, 0.6 s, and falls on whoever makes an object
        return {"layers": job["layers"], "rows": {name: measured(name, job) for name in MODELS}}


def captured(name: str, layers: int) -> tuple[fx.GraphModule, float]:
    """The graph of a step, and what Dynamo spent on it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    model, given = MODELS[name](layers)
    before = calculate_time_spent().get("entire_frame_compile", 0.0)
    torch.compile(model, backend=keep)(**given)
    (gm,) = graphs
    return gm, calculate_time_spent()["entire_frame_compile"] - before


def measured(name: str, job: Job) -> dict[str, Any]:
    from kvpass.patterns import DEFAULT

    from kvpass.graph.plain import plain
    from kvpass.lowering.lower import lower
    from kvpass.plan.plan import plan
    from kvpass.policy.policy import Policy
    from kvpass.sites.scan import scan

    say(f"capturing: {name}")
    gm, capture = captured(name, job["layers"])
    policy = Policy.load("h2o").with_budget(0.2)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in range(job["rounds"]):
        say(f"{name}, round {number + 1} of {job['rounds']}")
        marks = [time.perf_counter()]
        graph = plain(gm)
        table = scan(graph, DEFAULT)
        marks.append(time.perf_counter())
        planned = plan(policy, table, None)
        marks.append(time.perf_counter())
        lowered = lower(graph, planned)
        marks.append(time.perf_counter())
        for stage, begin, end in zip(STAGES, marks, marks[1:], strict=False):
            seconds[stage].append(end - begin)
    ops = sum("decode_attend" in str(node.target) for node in lowered.gm.graph.nodes)
    return {"nodes": len(gm.graph.nodes), "sites": len(table.sites), "ops": ops, "capture_s": capture, **seconds}


def total(row: dict[str, Any]) -> float:
    """Median seconds of all three together."""
    return statistics.median(map(sum, zip(*(row[stage] for stage in STAGES), strict=True)))


def grids(found: Results) -> list[Grid]:
    rows = []
    for result in found.values():
        for name, row in result["rows"].items():
            times = [f"{statistics.median(row[stage]):.2f}" for stage in STAGES]
            share = f"{total(row) / row['capture_s']:.1%}"
            right = "ok" if row["sites"] == row["ops"] == result["layers"] else f"WRONG: {row['ops']} of them rewritten"
            cells = [name, str(result["layers"]), str(row["nodes"]), *times, f"{total(row):.2f}", share, right]
            rows.append(cells)
    columns = ("model", "layers", "nodes", "scan, s", "plan, s", "lower, s", "together, s", "of capture", "check")
    return [Grid("A graph of many layers: what kvpass adds to Dynamo's capture", columns, rows)]


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        worst = max(result["rows"].values(), key=total)
        shares = max(total(row) / row["capture_s"] for row in result["rows"].values())
        asked = result["layers"] == LAYERS
        what = f"scan + plan + lower, {result['layers']} layers"
        out.append(Aim(f"{what}: seconds, slower model", total(worst), 0.7 if asked else None, least=False, unit=" s"))
        out.append(Aim(f"{what}: of capture, worse model", 100 * shares, 3 if asked else None, least=False, unit=" %"))
    return out
