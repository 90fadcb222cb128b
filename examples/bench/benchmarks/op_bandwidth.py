"""decode_attend alone: bytes of live keys and values a second, as a share of the machine's read bandwidth.

States are those of SmolLM2's layers behind a real prompt, copied until all of them together are larger than caches: the
calls of one round visit each state once, as the layers of a model do. Policies take turns. Each policy's first call is
compared with attention in float64. The read bandwidth is the better of two: of a buffer far larger than caches, and of
as many bytes as the last policy reads, summed up layer by layer in turns with the policies.
"""

from __future__ import annotations

from typing import Any

import smollm2
import torch
from workers import say

from bench.bandwidth import read_bandwidth
from bench.contenders import prompt
from bench.op_calls import Call, calls_of_a_step, expected
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import quartiles, timed, turned, without_gc

MINUTES = 3
LAYERS, LIVE = 6, 150e6
"""LIVE: bytes of keys and values that a round should read."""
POLICIES = ("full", "streaming_llm", "knorm", "h2o", "snapkv", "ada_snapkv")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Norm of the difference over the norm."""


def jobs(options: Options) -> list[Job]:
    cases = [("2048x8", "float32")]
    if options.long:  # a prompt in bfloat16 takes minutes on a CPU without instructions for it
        cases += [("4096x1", "float32"), ("2048x8", "bfloat16")]
    if options.quick:
        cases = [("512x2", "float32")]
    found = []
    for case, dtype in cases:
        context, batch = (int(part) for part in case.split("x"))
        found.append(
            {
                "name": case if dtype == "float32" else f"{case}-{dtype}",
                "context": context,
                "batch": batch,
                "dtype": dtype,
                "live": 5e6 if options.quick else LIVE,
                "layers": 2 if options.quick else LAYERS,
                "rounds": options.rounds_or(20),
                "policies": ["full", "h2o", "ada_snapkv"] if options.quick else list(POLICIES),
            }
        )
    return found


def work(job: Job, save: Save) -> dict[str, Any]:
    device = job["device"]
    bandwidth = read_bandwidth(device)
    model, tokenizer = smollm2.load(dtype=getattr(torch, job["dtype"]), layers=job["layers"])
    model.to(device)
    ids = prompt(tokenizer, job["context"] + 3, job["batch"]).to(device)
    calls: dict[str, list[Call]] = {}
    found: dict[str, Any] = {}
    for policy in job["policies"]:
        say(f"states of {policy}")
        own = calls_of_a_step(model, policy, None if policy == "full" else job["context"] // 5, ids)
        copies = max(1, round(job["live"] / sum(call.live_bytes() for call in own)))
        calls[policy] = [call.again() for _ in range(copies) for call in own]
        out, wanted = own[0].again().run(), expected(own[0])
        found[policy] = {
            "live_bytes": sum(call.live_bytes() for call in calls[policy]),
            "ragged": own[0].ragged,
            "off": float((out.double() - wanted).norm() / wanted.norm()),
            "step_s": [],
        }

    def step(policy: str) -> None:
        for call in calls[policy]:
            call.run()

    plain = [torch.ones(call.live_bytes() // 4, device=device) for call in calls[job["policies"][-1]]]
    reads: list[float] = []
    for policy in job["policies"]:
        step(policy)
    with without_gc():
        for number in range(job["rounds"]):
            say(f"round {number + 1} of {job['rounds']}")
            reads.append(timed(lambda: [one.sum() for one in plain], device))
            for policy in turned(job["policies"], number):
                for call in calls[policy]:
                    call.ready()
                found[policy]["step_s"].append(timed(lambda p=policy: step(p), device))
    bandwidth = max(bandwidth, sum(one.nbytes for one in plain) / quartiles(reads)[1])
    return {**{k: job[k] for k in ("name", "context", "batch", "dtype")}, "read_bandwidth": bandwidth, "found": found}


def share(one: dict[str, Any], result: dict[str, Any]) -> float:
    """Of the read bandwidth: live bytes over time."""
    return float(one["live_bytes"]) / quartiles(one["step_s"])[1] / float(result["read_bandwidth"])


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for policy, one in result["found"].items():
            low, middle, high = (1e3 * t for t in quartiles(one["step_s"]))
            good = one["off"] <= TOLERANCE[result["dtype"]]
            rows.append(
                [
                    policy,
                    "ragged" if one["ragged"] else "even",
                    f"{one['live_bytes'] / 1e6:.0f}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    f"{one['live_bytes'] / middle / 1e6:.1f}",
                    f"{share(one, result):.0%}",
                    "ok" if good else f"WRONG: off by {one['off']:.1e}",
                ]
            )
        columns = ("policy", "heads", "live KV, MB", "all calls, ms (quartiles)", "GB/s", "of bandwidth", "check")
        title = f"decode_attend: slots of {result['context']:,} tokens x batch {result['batch']}, {result['dtype']}"
        note = f"a fifth of the tokens, but for `full`; read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s"
        grids.append(Grid(title, columns, rows, note))
    return grids


def aims(found: Results) -> list[Aim]:
    out = []
    for name, result in found.items():
        asked = name == "2048x8"
        for policy, what, least in (("h2o", "even", 0.80), ("ada_snapkv", "ragged", 0.75)):
            value = share(result["found"][policy], result)
            text = f"decode_attend, {name}: share of read bandwidth, {what} heads ({policy})"
            out.append(Aim(text, value, least if asked else None, unit=""))
        wrong = sum(one["off"] > TOLERANCE[result["dtype"]] for one in result["found"].values())
        out.append(Aim(f"decode_attend, {name}: policies whose output is wrong", wrong, 0, least=False, unit=""))
    return out
