"""Where the time of a decode step goes: weights, decode_attend, attention and cache of others, and the rest.

torch's profiler says what each operation took by itself; an operation inside of decode_attend counts as decode_attend.
The rest is what no operation counts: Python, Dynamo, and kernels that Inductor made. Shares are of the profiled time;
the step's time beside them is without a profiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import smollm2
import torch
from torch.profiler import ProfilerActivity, profile
from workers import say

from bench.contenders import Contender, Spec, hf, ours, prompt, tracing
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import quartiles, timed

MINUTES = 2
WARM_UP, ROUNDS, PROFILED = 4, 7, 5
SPECS = (
    hf("dynamic", "eager"),
    ours("full", "eager"),
    ours("h2o", "eager"),
    ours("ada_snapkv", "eager"),
    ours("h2o", "tuned"),
)
KINDS = {
    "weights": ("mm", "addmm", "linear", "_linear_pointwise", "_mkl_linear", "mkldnn_linear", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "scaled_dot_product", "_softmax"),
    "cache": ("cat", "index_copy_", "copy_", "clone"),
}
"""Names of operations, outside of decode_attend."""


def jobs(options: Options) -> list[Job]:
    if options.device != "cpu":
        return []
    cases = [(128, 1)] if options.quick else [(4096, 1), (1024, 8)] if options.long else [(1024, 8)]
    specs = [spec for spec in SPECS if options.only in spec.name and not (options.quick and spec.options)]
    layers = 3 if options.quick else None
    return [
        {"name": f"{c}x{b}", "context": c, "batch": b, "layers": layers, "specs": [one.to_dict() for one in specs]}
        for c, b in cases
    ]


def work(job: Job, save: Save) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = 64
    model, tokenizer = smollm2.load(layers=job["layers"])
    ids = prompt(tokenizer, job["context"], job["batch"])
    found: dict[str, Any] = {}
    for spec in (Spec(**given) for given in job["specs"]):
        say(spec.name)
        reader = Contender(Spec("", "eager", spec.policy, spec.budget), model, job["context"])
        reader.prefill(ids)
        one = Contender(spec, model, job["context"] + 50)
        one.adopt(reader)
        del reader
        with tracing(spec):
            for _ in range(WARM_UP):
                one.step()
        times = [timed(one.step) for _ in range(ROUNDS)]
        found[spec.name] = {"step_s": times, **split(lambda c=one: [c.step() for _ in range(PROFILED)])}
    return {"context": job["context"], "batch": job["batch"], "found": found}


def split(action: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of an action, profiled, and of the kinds of operations in it."""
    spent = dict.fromkeys(("weights", "decode_attend", "attention", "cache", "other operations"), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = timed(action)
    for event in profiled.events():
        spent[kind_of(event)] += event.self_cpu_time_total / 1e6
    return {"profiled_s": whole, "spent_s": spent}


def kind_of(event: Any) -> str:
    above = event
    while above is not None:
        if "kvpass::decode_attend" in above.name:
            return "decode_attend"
        above = above.cpu_parent
    name = event.name.split("::")[-1]
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), "other operations")


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for name, one in result["found"].items():
            spent = {**one["spent_s"], "the rest": one["profiled_s"] - sum(one["spent_s"].values())}
            shares = [f"{seconds / one['profiled_s']:.0%}" for seconds in spent.values()]
            rows.append([name, f"{1e3 * quartiles(one['step_s'])[1]:.1f}", *shares])
        columns = ("contender", "step, ms", "weights", "decode_attend", "attention", "cache", "others", "rest")
        title = f"Where a step's time goes: {result['context']:,} tokens x batch {result['batch']}, float32"
        grids.append(Grid(title, columns, rows))
    return grids


def aims(found: Results) -> list[Aim]:
    return []
