"""The largest batch whose caches fit into a fixed amount of memory, and how many tokens a second it gives.

A sequence's bytes, everything counted, are taken from a batch of one; the batch that they allow is then really made,
and what it holds is compared with the memory.
"""

from __future__ import annotations

from typing import Any

import smollm2
import torch
from workers import say

from bench.contenders import Contender, Spec, hf, ours, prompt
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import quartiles, timed

MINUTES = 1
MEMORY, CONTEXT, WARM_UP, MOST = 100e6, 512, 3, 64
SPECS = (hf("dynamic", "eager"), ours("full", "eager"), ours("h2o", "eager"), ours("ada_snapkv", "eager"))


def jobs(options: Options) -> list[Job]:
    quick = {"context": 128, "memory": 4e6, "layers": 3} if options.quick else {}
    some = SPECS if options.long else (SPECS[0], SPECS[2])
    specs = [spec.to_dict() for spec in some if options.only in spec.name]
    usual = {"context": CONTEXT, "memory": MEMORY, "layers": None}
    return [{"name": "batch", **usual, **quick, "specs": specs, "rounds": options.rounds_or(10)}]


def held(one: Contender) -> int:
    """Bytes of a cache, everything counted."""
    if one.spec.policy is None:
        return one.kv_bytes()
    import kvpass

    report = kvpass.report(one.cache).to_dict()
    return int(report["bytes"] + report["overhead_bytes"])


def work(job: Job, save: Save) -> dict[str, Any]:
    device = job["device"]
    model, tokenizer = smollm2.load(layers=job["layers"])
    model.to(device)
    found: dict[str, Any] = dict(job["before"].get("found", {}))
    for spec in (Spec(**given) for given in job["specs"]):
        if spec.name in found:
            continue
        say(f"{spec.name}: one sequence")
        one = behind(spec, model, prompt(tokenizer, job["context"], 1).to(device))
        batch = min(MOST, int(job["memory"] // held(one)))
        say(f"{spec.name}: {batch} sequences")
        many = behind(spec, model, prompt(tokenizer, job["context"], batch).to(device))
        times = [timed(many.step, device) for _ in range(job["rounds"])]
        found[spec.name] = {"one": held(one), "batch": batch, "many": held(many), "step_s": times}
        save({"found": found})
    return {"context": job["context"], "memory": job["memory"], "found": found}


def behind(spec: Spec, model: Any, ids: torch.Tensor) -> Contender:
    """A contender behind a prompt, warm."""
    one = Contender(spec, model, ids.shape[1] + WARM_UP)
    one.prefill(ids)
    for _ in range(WARM_UP):
        one.step()
    return one


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for name, one in result["found"].items():
            middle = quartiles(one["step_s"])[1]
            fits = one["many"] <= 1.01 * result["memory"]  # while it was timed each sequence grew by some tokens
            rows.append(
                [
                    name,
                    f"{one['one'] / 1e6:.2f}",
                    str(one["batch"]) + (" (all that were tried)" if one["batch"] == MOST else ""),
                    f"{one['many'] / 1e6:.1f}",
                    f"{1e3 * middle:.1f}",
                    f"{one['batch'] / middle:.0f}",
                    "ok" if fits else "WRONG: does not fit",
                ]
            )
        columns = ("contender", "a sequence, MB", "largest batch", "held, MB", "step, ms", "tokens/s", "check")
        title = f"Largest batch in {result['memory'] / 1e6:.0f} MB of cache, {result['context']:,} tokens each, float32"
        grids.append(Grid(title, columns, rows, "eager; all tensors of a cache counted"))
    return grids


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        theirs, mine = (result["found"].get(spec.name) for spec in (SPECS[0], SPECS[2]))
        if theirs and mine:
            what = f"largest batch in {result['memory'] / 1e6:.0f} MB, h2o 20 % against HF's full cache"
            out.append(Aim(what, mine["batch"] / theirs["batch"], None))
    return out
