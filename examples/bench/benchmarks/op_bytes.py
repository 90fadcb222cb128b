"""What decode_attend moves in a step under every built-in policy, beside the least that it must.

The least: the keys and values that are held, read once, codes and scales and whole copies as they are stored; the
statistics of what is held, read and written once where a step observes. `touched`: pages of the state that the
processor touched, counted by Linux. `by operations`: what torch's operations read and wrote, as if nothing stayed in a
cache; nothing where the op is a kernel of its own. Layers of SmolLM2, a fifth of a real prompt; weights and tables that
policies read are random.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import smollm2
from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.decode_attend import decode_attend
from workers import say

from bench.contenders import prompt
from bench.counted import Counting, Touched
from bench.op_calls import Call, calls_of_a_step
from bench.own_weights import weights, with_weights
from bench.suite import Aim, Grid, Job, Options, Results, Save
from kvpass.errors import KVPassError
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

MINUTES = 4
TRIES = 2
"""Of which the one that touched most counts: a kernel that reclaims memory takes marks away meanwhile."""
QUICK = ("full", "ada_snapkv", "h2o_int8")


def jobs(options: Options) -> list[Job]:
    if options.device != "cpu":  # a GPU's kernels are no torch operations, and its pages are not the processor's
        return []
    chosen = [name for name in names() if name in QUICK or not options.quick]
    context = 256 if options.quick else 1024
    return [{"name": "policies", "policies": chosen, "context": context, "batch": 2, "layers": 2}]


def work(job: Job, save: Save) -> dict[str, Any]:
    model, tokenizer = smollm2.load(layers=job["layers"])
    ids = prompt(tokenizer, job["context"] + 3, job["batch"])
    found: dict[str, Any] = dict(job["before"].get("found", {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = weights(Path(scratch), model.config)
        for name in job["policies"]:
            if name not in found:
                say(name)
                found[name] = one_policy(name, folder, model, ids)
                save({"found": found})
    return {"context": job["context"], "batch": job["batch"], "layers": job["layers"], "found": found}


def one_policy(name: str, folder: Path, model: Any, ids: Any) -> dict[str, Any]:
    try:
        policy = with_weights(name, folder).with_budget(None if Policy.load(name).keeps_all else 0.2)
        calls = calls_of_a_step(model, policy, None, ids)
    except KVPassError as error:
        return {"left_out": error.what}
    if not calls:
        return {"left_out": "its step calls no decode_attend"}
    total = {"least": 0, "counted": 0, "operations": 0, "touched": 0, "state": 0}
    for call in calls:
        counting, given = Counting(), call.again().given
        with counting:
            decode_attend(**given)
        total["touched"] += max(touched_by(call) for _ in range(TRIES))
        total["least"] += least(call)
        total["counted"] += counting.bytes
        total["operations"] += counting.calls
        total["state"] += sum(tensor.nbytes for tensor in call.given["state"])
    return {**total, "ragged": any(call.ragged for call in calls)}


def touched_by(call: Call) -> int:
    """Bytes of the state's pages that the call touches; 0 where the kernel does not tell."""
    held = Touched(call.given["state"])
    given = {**call.again().given, "state": held.tensors}
    return held.bytes(lambda: decode_attend(**given)) or 0


def least(call: Call) -> int:
    """Bytes that a step must move."""
    observes = bool(emitted(call.rule)) and call.rule[Observation].decode != "none"
    return call.live_bytes() + (2 * call.stats_bytes() if observes else 0)


def grids(found: Results) -> list[Grid]:
    rows, note = [], ""
    for result in found.values():
        for name, one in result["found"].items():
            if "left_out" in one:
                note += f"{name} left out: {one['left_out']}. "
                continue
            seen = one["counted"] > one["least"] / 2  # else the work is done by kernels that it cannot see
            rows.append(
                [
                    name,
                    "ragged" if one["ragged"] else "even",
                    f"{one['state'] / 1e3:.0f}",
                    f"{one['least'] / 1e3:.0f}",
                    f"{one['touched'] / one['least']:.2f}x" if one["touched"] else "",
                    f"{one['counted'] / one['least']:.2f}x" if seen else "",
                    str(one["operations"]),
                ]
            )
    columns = ("policy", "heads", "state, kB", "least, kB", "touched", "by operations", "torch operations")
    return [Grid("decode_attend: bytes of a step against the least possible", columns, rows, note)]


def aims(found: Results) -> list[Aim]:
    every = [one for result in found.values() for one in result["found"].values() if one.get("touched")]
    if not every:
        return []
    worst = max(one["touched"] / one["least"] for one in every)
    text = f"decode_attend: pages touched against the least possible, worst of {len(every)} policies"
    return [Aim(text, worst, None, least=False)]
