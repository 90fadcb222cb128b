"""A prompt read by Hugging Face and under policies, prefill by prefill in turns, under the same inner compilers.

What a policy adds: attention's statistics, scores, the choice and the move of what is kept. KL is of the next token,
which sees the whole prompt, to Hugging Face's.
"""

from __future__ import annotations

import gc
import statistics
from typing import Any

import smollm2
import torch
from torch._dynamo.utils import calculate_time_spent
from workers import say

from bench.contenders import Contender, Spec, divergence, hf, ours, prompt, tracing
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import median_ratio, quartiles, timed, turned

MINUTES = 5
TOLERANCE = 1e-6
SPECS = [
    spec
    for under in ("eager", "inductor")
    for spec in (hf("dynamic", under), *(ours(policy, under) for policy in ("full", "knorm", "snapkv", "h2o")))
]
MOST = {"h2o": 1.20, "snapkv": 1.05, "knorm": 1.01}
"""Times of attention alone that are aimed at."""


def jobs(options: Options) -> list[Job]:
    context = 256 if options.quick else 4096
    specs = [spec for spec in SPECS if spec.under == "eager"] if options.quick else SPECS
    if not options.long:
        specs = [spec for spec in specs if spec.policy != "full"]
    return [
        {
            "name": f"{context}x1",
            "context": context,
            "batch": 1,
            "layers": 3 if options.quick else None,
            "rounds": 2 if options.quick else 4,
            "specs": [spec.to_dict() for spec in specs if options.only in spec.name],
        }
    ]


def work(job: Job, save: Save) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = 64
    device = job["device"]
    model, tokenizer = smollm2.load(layers=job["layers"])
    model.to(device)
    ids = prompt(tokenizer, job["context"], job["batch"]).to(device)
    contenders = [Contender(Spec(**spec), model, job["context"]) for spec in job["specs"]]
    found: dict[str, Any] = {c.spec.name: {"spec": c.spec.to_dict(), "prefill_s": []} for c in contenders}
    reference: Any = None
    for one in contenders:
        say(f"first call: {one.spec.name}")
        spent = calculate_time_spent().get("entire_frame_compile", 0.0)
        with tracing(one.spec):
            one.prefill(ids)
        reference = one.logits if reference is None else reference
        mine = found[one.spec.name]
        mine["compile_s"] = calculate_time_spent().get("entire_frame_compile", 0.0) - spent
        mine["kl"], mine["kv_bytes"] = divergence(reference, one.logits), one.kv_bytes()
        one.cache = None
    for number in range(job["rounds"]):
        for one in turned(contenders, number):
            say(f"round {number + 1} of {job['rounds']}: {one.spec.name}")
            found[one.spec.name]["prefill_s"].append(timed(lambda c=one: c.prefill(ids), device))
            one.cache = None
            gc.collect()
    return {**{key: job[key] for key in ("name", "context", "batch", "rounds")}, "contenders": found}


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for name, one in result["contenders"].items():
            low, middle, high = quartiles(one["prefill_s"])
            against = against_hf(one, result)
            rows.append(
                [
                    name,
                    f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    f"{against:.2f}x" if against else "",
                    f"{one['kv_bytes'] / 1e6:.1f}",
                    f"{one['compile_s']:.0f}",
                    "ok" if one["kl"] <= TOLERANCE else f"WRONG: KL {one['kl']:.1e}",
                ]
            )
        columns = ("contender", "prefill, s (quartiles)", "of HF's, same inner", "KV kept, MB", "compile, s", "check")
        title = f"Prefill: {result['context']:,} tokens x batch {result['batch']}, float32"
        grids.append(Grid(title, columns, rows, f"{result['rounds']} rounds after the call that compiles"))
    return grids


def middle(found: dict[str, Any]) -> float:
    """Median seconds of a prompt."""
    return quartiles(found["prefill_s"])[1]


def against_hf(one: dict[str, Any], result: dict[str, Any]) -> float | None:
    under = Spec(**one["spec"]).under
    theirs = result["contenders"].get(hf("dynamic", under).name)
    return median_ratio(one["prefill_s"], theirs["prefill_s"]) if theirs else None


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        for policy, most in MOST.items():
            mine = [one for one in result["contenders"].values() if one["spec"]["policy"] == policy]
            ratios = [against for one in mine if (against := against_hf(one, result)) is not None]
            if ratios:
                what = f"{result['name']}: prefill, {policy} against HF under the same inner compiler, mean"
                small = result["context"] < 4096
                out.append(Aim(what, statistics.mean(ratios), None if small else most, least=False))
        wrong = sum(one["kl"] > TOLERANCE for one in result["contenders"].values())
        out.append(Aim(f"{result['name']}: prefills whose next token is wrong", wrong, 0, least=False, unit=""))
    return out
