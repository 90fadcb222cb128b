"""Graphs that are compiled in 2,000 steps while a budget that is a fraction grows: none after the first steps."""

from __future__ import annotations

from typing import Any

import torch
from spelling import cache_of, with_cache
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from workers import say

import kvpass
from bench.suite import Aim, Grid, Job, Options, Results, Save

MINUTES = 1
PROMPT, WARM_UP, BUDGET, HELD = 500, 4, 0.2, 1.03
CASES = (("h2o", "eager"), ("ada_snapkv", "eager"), ("h2o", "inductor"))


def jobs(options: Options) -> list[Job]:
    cases = CASES[:1] if options.quick else CASES if options.long else CASES[:2]
    return [
        {"name": f"{policy}, {inner}", "policy": policy, "inner": inner, "steps": 200 if options.quick else 2000}
        for policy, inner in cases
    ]


def work(job: Job, save: Save) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=97, max_position_embeddings=8192, **sizes)
    model = LlamaForCausalLM(config).eval().to(job["device"])
    compiled = kvpass.compile(model, job["policy"], BUDGET, inner=job["inner"])
    out = compiled(input_ids=torch.randint(3, 97, (2, PROMPT), device=job["device"]), use_cache=True)
    graphs, slots = 0, []
    for step in range(job["steps"] + WARM_UP):
        if step == WARM_UP:
            graphs = int(counters["stats"]["unique_graphs"])
        if step % 100 == 0:
            say(f"step {step}")
            slots.append(kvpass.report(cache_of(out)).to_dict()["bytes"])
        token = out.logits[:, -1:].argmax(-1)
        out = compiled(input_ids=token, **with_cache(compiled, cache_of(out)), use_cache=True)
    report = kvpass.report(cache_of(out)).to_dict()
    return {
        **{key: job[key] for key in ("policy", "inner", "steps")},
        "before": graphs,
        "recompilations": int(counters["stats"]["unique_graphs"]) - graphs,
        "bytes": [slots[0], report["bytes"]],
        "held": report["bytes"] / report["dense_bytes"],
    }


def grids(found: Results) -> list[Grid]:
    rows = []
    for one in found.values():
        right = "ok" if BUDGET / HELD <= one["held"] <= BUDGET * HELD else f"WRONG: {one['held']:.1%} held"
        grew = f"{one['bytes'][1] / one['bytes'][0]:.1f}x"
        name = f"{one['policy']} {BUDGET:.0%}, {one['inner']}"
        rows.append([name, f"{one['steps']:,}", str(one["before"]), grew, str(one["recompilations"]), right])
    columns = ("policy", "steps", "graphs before", "cache grew", "graphs compiled in them", "check")
    return [Grid("Recompilations while a budget grows", columns, rows, "a small random Llama, batch 2")]


def aims(found: Results) -> list[Aim]:
    worst = max(one["recompilations"] for one in found.values())
    steps = min(one["steps"] for one in found.values())
    return [Aim(f"recompilations in {steps:,} steps, fraction budget growing", worst, 0, least=False, unit="")]
