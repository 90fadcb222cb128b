"""The most bytes that tensors have while a prompt is read, whole and in chunks, beyond the weights.

Allocations are those that torch's profiler notes. A prompt in chunks should need its budget, one layer of a chunk, and
what the model itself needs for a chunk.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import smollm2
import torch
from spelling import cache_of, with_cache
from torch.profiler import ProfilerActivity, profile
from workers import say

import kvpass
from bench.contenders import prompt
from bench.suite import Aim, Grid, Job, Options, Results, Save

MINUTES = 1
CONTEXT, CHUNK = 4096, 512
POLICIES = (None, "full", "h2o", "snapkv", "knorm", "ada_snapkv")


def jobs(options: Options) -> list[Job]:
    sizes = {"context": 256, "chunk": 64, "layers": 3} if options.quick else {"context": CONTEXT, "chunk": CHUNK}
    return [{"name": "prefill", "layers": None, **sizes, "policies": list(POLICIES if options.long else (None, "h2o"))}]


def peak_of(action: Callable[[], Any], device: str) -> int:
    """Most bytes that the tensors which an action makes have together."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def work(job: Job, save: Save) -> dict[str, Any]:
    device = job["device"]
    model, tokenizer = smollm2.load(layers=job["layers"])
    model.to(device)
    ids = prompt(tokenizer, job["context"], 1).to(device)
    found: dict[str, Any] = dict(job["before"].get("found", {}))
    for policy in job["policies"]:
        if str(policy) in found:
            continue
        budget = None if policy == "full" else job["context"] // 5
        compiled = model if policy is None else kvpass.compile(model, policy, budget, inner="eager")
        found[str(policy)] = {}
        for way, size in (("whole", job["context"]), ("chunks", job["chunk"])):
            say(f"{policy or 'HF'}, {way}")
            read(compiled, ids, size)  # compiles
            kept: list[Any] = []
            peak = peak_of(lambda c=compiled, s=size, k=kept: k.append(read(c, ids, s)), device)
            found[str(policy)][way] = {"peak": peak, "held": held(kept[0])}
            kept.clear()
        save({"found": found})
    return {"context": job["context"], "chunk": job["chunk"], "found": found}


def read(model: Any, ids: torch.Tensor, size: int) -> Any:
    """The cache behind a prompt that is read in chunks."""
    cache: Any = None
    for chunk in ids.split(size, dim=1):
        cache = cache_of(model(input_ids=chunk, **with_cache(model, cache), use_cache=True, logits_to_keep=1))
    return cache


def held(cache: Any) -> int:
    try:
        report = kvpass.report(cache).to_dict()
    except kvpass.KVPassError:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return int(report["bytes"] + report["overhead_bytes"])


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for policy, ways in result["found"].items():
            name = "HF dynamic" if policy == "None" else f"kvpass {policy}" + ("" if policy == "full" else " 20 %")
            cells = [f"{ways[way][what] / 1e6:.1f}" for what in ("peak", "held") for way in ("whole", "chunks")]
            right = all(one["held"] <= one["peak"] for one in ways.values())
            rows.append([name, *cells, "ok" if right else "WRONG: less than is held"])
        columns = ("contender", "peak, whole, MB", "peak, chunks, MB", "held, whole, MB", "held, chunks, MB", "check")
        chunk = result["chunk"]
        title = f"Peak memory of a prompt of {result['context']:,} tokens, whole and in chunks of {chunk:,}, float32"
        grids.append(Grid(title, columns, rows, "eager; batch 1; the weights are not counted"))
    return grids


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        full, kept = result["found"].get("None"), result["found"].get("h2o")
        if full and kept:
            what = f"peak of a prompt in chunks of {result['chunk']:,}, h2o 20 % against HF's full cache"
            out.append(Aim(what, full["chunks"]["peak"] / kept["chunks"]["peak"], None))
    return out
