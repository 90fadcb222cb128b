"""Decode steps of SmolLM2 end to end: every cache, policy and inner compiler in turns, step by step.

A prompt is read once for each policy (eagerly) and its cache copied to whoever goes on with it, so all contenders of a
policy begin alike; all read the same text, token by token. `bound` is the time in which the machine reads all weights
and the live keys and values once. KL is between next tokens, after the warm-up: a full cache's to Hugging Face's, a
policy's to the same policy run node by node. Contenders in other environments are processes of their own that take
their turns too.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import smollm2
import torch
from torch._dynamo.utils import calculate_time_spent, counters
from workers import say

from bench.bandwidth import read_bandwidth
from bench.contenders import Contender, Spec, divergence, hf, ours, prompt, tracing, weight_bytes
from bench.peers import Peer, peers
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import median_ratio, quartiles, timed, turned, without_gc

MINUTES = 13
WARM_UP = 4
"""Steps; by then everything is compiled."""
PAUSE = 0.02
"""Seconds before a step where there are other processes: threads that wait for work spin for some milliseconds."""
SAVED_EVERY = 5
"""Rounds after which an interrupted run may go on."""
TOLERANCE = {"float32": (1e-6, 1e-3), "bfloat16": (2e-2, 5e-2)}
"""Nats: of a full cache (another order of sums), of a policy (another order may let a tie fall the other way)."""
HELD = 1.03
"""Slots are allocated up to 2.5 % ahead (docs/design/0001), and whole ones."""

FULL = [hf("dynamic", "eager"), hf("dynamic", "frozen"), hf("dynamic", "tuned"), hf("static", "tuned")]
OURS = [ours(policy, under) for policy in ("full", "h2o", "snapkv", "ada_snapkv") for under in ("eager", "tuned")]
FROZEN = [ours("h2o", "frozen")]
MORE = [hf("static", "inductor"), hf("static", "frozen"), ours("full", "frozen"), ours("h2o", "inductor")]
BFLOAT16 = [hf("dynamic", "eager"), hf("dynamic", "tuned"), ours("full", "tuned"), ours("h2o", "tuned")]
ON_GPU = [
    Spec(f"kvpass {name}, reduce-overhead", "inductor", policy, budget, mode="reduce-overhead")
    for name, policy, budget in (("full", "full", 1.0), ("h2o 20 %", "h2o", 0.2))
]


def jobs(options: Options) -> list[Job]:
    if options.quick:
        cases = [("1024x1", "float32", [hf("dynamic", "eager"), *OURS[2:5]])]
    else:
        some = [spec for spec in OURS if spec.under == "eager" or spec.policy in ("full", "h2o")]
        cases = [("4096x1", "float32", [*FULL, *some, *FROZEN, *MORE]), ("2048x8", "float32", [*FULL, *OURS, *FROZEN])]
    if options.long:
        cases += [("4096x1", "bfloat16", BFLOAT16)]
    return [job_of(case, dtype, specs, options) for case, dtype, specs in cases]


def job_of(case: str, dtype: str, specs: list[Spec], options: Options) -> Job:
    context, batch = (int(part) for part in case.split("x"))
    if options.device != "cpu":
        specs = [*specs, *ON_GPU]
    return {
        "name": case if dtype == "float32" else f"{case}-{dtype}",
        "context": context,
        "batch": batch,
        "dtype": dtype,
        "layers": 3 if options.quick else None,
        "rounds": options.rounds_or(30),
        "specs": [spec.to_dict() for spec in specs if options.only in spec.name],
        "peers": [one for one in peers(options) if dtype == "float32" and batch <= one.get("most_rows", batch)],
    }


class Stepping(Protocol):
    """Whoever can take a step."""

    def step(self, token: torch.Tensor) -> None: ...


def work(job: Job, save: Save) -> dict[str, Any]:
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code object of the model's forward
    device = job["device"]
    say("measuring read bandwidth")
    bandwidth = read_bandwidth(device)
    model, tokenizer = smollm2.load(dtype=getattr(torch, job["dtype"]), layers=job["layers"])
    model.to(device)
    text = prompt(tokenizer, job["context"] + WARM_UP + job["rounds"], job["batch"]).to(device)
    ids, later = text[:, : job["context"]], text[:, job["context"] :].split(1, dim=1)
    specs = [Spec(**spec) for spec in job["specs"]]
    found: dict[str, Any] = {spec.name: {"spec": spec.to_dict()} for spec in specs}
    contenders, reference = started(specs, model, ids, text.shape[1] + 1)
    logits = warmed_up(contenders, reference, later[:WARM_UP], found)
    others = [Peer(one, job) for one in job["peers"]]
    read_by_others(others, logits[None], len(later[:WARM_UP]), found)
    everybody: list[tuple[str, Stepping]] = [(c.spec.name, c) for c in contenders]
    everybody += [(one.name, one) for one in others]
    seconds: dict[str, list[float]] = job["before"].get("step_s", {name: [] for name, _ in everybody})
    done, before = len(next(iter(seconds.values()))), int(counters["stats"]["unique_graphs"])
    with without_gc():
        for number, token in enumerate(later[WARM_UP : len(later) - done], done):
            say(f"round {number + 1} of {job['rounds']}")
            for name, one in turned(everybody, number):
                time.sleep(PAUSE if others else 0)
                seconds[name].append(timed(lambda c=one, t=token: c.step(t), device))
            if (number + 1) % SAVED_EVERY == 0:
                save({"step_s": seconds})
    for contender in contenders:
        found[contender.spec.name]["kv_bytes"] = contender.kv_bytes()
    for one in others:
        found[one.name]["kv_bytes"] = one.ask("bytes")
        one.close()
    for name, times in seconds.items():
        found[name]["step_s"] = times
    return {
        **{key: job[key] for key in ("name", "context", "batch", "dtype", "rounds")},
        "read_bandwidth": bandwidth,
        "weight_bytes": weight_bytes(model),
        "full_bytes": found[specs[0].name]["kv_bytes"] if specs[0].policy is None else None,
        "compiled_while_timing": int(counters["stats"]["unique_graphs"]) - before,
        "contenders": found,
    }


def started(
    specs: list[Spec], model: Any, ids: torch.Tensor, length: int
) -> tuple[list[Contender], dict[str | None, Contender]]:
    """All contenders behind the prompt, and for each policy one that goes on node by node."""
    contenders: list[Contender] = []
    references: dict[str | None, Contender] = {}
    for policy in dict.fromkeys([None, *(spec.policy for spec in specs)]):
        budget = next((spec.budget for spec in specs if spec.policy == policy), 1.0)
        reader = references[policy] = Contender(Spec("", "eager", policy, budget), model, length)
        say(f"prompt: {policy or 'HF'}")
        reader.prefill(ids)
        for spec in (one for one in specs if one.policy == policy):
            contenders.append(Contender(spec, model, length))
            contenders[-1].adopt(reader)
        gc.collect()
    order = [spec.name for spec in specs]
    return sorted(contenders, key=lambda one: order.index(one.spec.name)), references


def warmed_up(
    contenders: list[Contender],
    references: dict[str | None, Contender],
    tokens: Iterable[torch.Tensor],
    found: dict[str, Any],
) -> dict[str | None, torch.Tensor]:
    """Compiles; checks each contender's logits. Returns those of the references, whose caches go."""
    logits: dict[str | None, torch.Tensor] = {}
    for policy, reference in references.items():
        for token in tokens:
            reference.step(token)
        assert reference.logits is not None
        logits[policy] = reference.logits
        reference.cache = None
    for contender in contenders:
        name, policy = contender.spec.name, contender.spec.policy
        say(f"first steps: {name}")
        spent = calculate_time_spent().get("entire_frame_compile", 0.0)
        contender.grows()
        with tracing(contender.spec):
            for token in tokens:
                contender.step(token)
        found[name]["compile_s"] = calculate_time_spent().get("entire_frame_compile", 0.0) - spent
        found[name]["timings_s"] = contender.timings()
        found[name]["kl"] = divergence(logits[None if policy == "full" else policy], contender.logits)
        found[name]["kl_to_full"] = divergence(logits[None], contender.logits)
    return logits


def read_by_others(others: list[Peer], logits: torch.Tensor, steps: int, found: dict[str, Any]) -> None:
    """Prompts and first steps of the contenders in other environments, and how far they are from the full cache."""
    with tempfile.TemporaryDirectory(prefix="kvpass-bench-") as scratch:
        path = Path(scratch) / "logits.pt"
        torch.save(logits.cpu(), path)
        for one in others:
            say(f"prompt and first steps: {one.name}")
            one.ask("prefill")
            for _ in range(steps):
                one.ask("step")
            found[one.name] = {"peer": one.about, "kl_to_full": one.ask(f"kl {path}")}


def checked(found: dict[str, Any], result: dict[str, Any]) -> str:
    """`ok`, or what is wrong with a contender's answers or bytes."""
    if "peer" in found:
        return f"KL to full {found['kl_to_full']:.3f}" if found["kl_to_full"] is not None else "other weights"
    full, some = TOLERANCE[result["dtype"]]
    spec = found["spec"]
    evicts = spec["policy"] not in (None, "full")
    if not found["kl"] <= (some if evicts else full):
        return f"WRONG: KL {found['kl']:.1e}"
    most = spec["budget"] * HELD * (result["full_bytes"] or float("inf"))
    return "ok" if not evicts or found["kv_bytes"] <= most else f"TOO MUCH: {found['kv_bytes'] / 1e6:.1f} MB"


def middle(found: dict[str, Any]) -> float:
    """Median seconds of a step."""
    return quartiles(found["step_s"])[1]


def bound(found: dict[str, Any], result: dict[str, Any]) -> float:
    """Seconds in which all that a step must read is read once."""
    return float(result["weight_bytes"] + found["kv_bytes"]) / float(result["read_bandwidth"])


def grids(found: Results) -> list[Grid]:
    return [grid_of(result) for result in found.values()]


def grid_of(result: dict[str, Any]) -> Grid:
    rows = []
    for name, one in result["contenders"].items():
        low, median, high = (1e3 * t for t in quartiles(one["step_s"]))
        least = 1e3 * bound(one, result) if one["kv_bytes"] else 0.0
        rows.append(
            [
                name,
                f"{median:.1f} ({low:.1f} to {high:.1f})",
                f"{least:.1f}" if least else "",
                f"{median / least:.1f}x" if least else "",
                f"{one['kv_bytes'] / 1e6:.1f}" if one["kv_bytes"] else "",
                f"{one['compile_s']:.0f}" if "compile_s" in one else "",
                checked(one, result),
            ]
        )
    columns = ("contender", "step, ms (quartiles)", "bound, ms", "of bound", "KV, MB", "compile, s", "check")
    title = f"Decode: {result['context']:,} tokens x batch {result['batch']}, {result['dtype']}"
    note = f"{result['rounds']} rounds; read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s"
    late = result["compiled_while_timing"]
    return Grid(title, columns, rows, note + (f"; {late} graphs were compiled while timing" if late else ""))


AIMS = {"2048x8": 3.5, "4096x1": 1.6}
PEERS = {"snapkv": 1.8, "ada_snapkv": 3.5}


def aims(found: Results) -> list[Aim]:
    return [aim for result in found.values() for aim in aims_of(result)]


def aims_of(result: dict[str, Any]) -> list[Aim]:
    name, out = result["name"], []
    everybody = result["contenders"]
    theirs, full = best(everybody, None), best(everybody, "full")
    for policy in ("h2o",):
        kept = best(everybody, policy)
        if kept and theirs:
            what = f"{name}: {policy} 20 % against the fastest of HF's full caches, best options of each"
            out.append(Aim(what, ratio(theirs, kept), AIMS.get(name)))
        if kept and full:
            allowed = bound(full, result) / bound(kept, result)
            what = f"{name}: {policy} 20 % against kvpass full, of what bytes allow ({allowed:.2f}x)"
            aim = 0.85 if name in AIMS and name != "4096x1" else None
            out.append(Aim(what, ratio(full, kept) / allowed, aim))
    for under in ("eager", "tuned"):
        pair = [everybody.get(ours(policy, under).name) for policy in ("snapkv", "ada_snapkv")]
        if all(pair):
            what = f"{name}: ada_snapkv 20 % against snapkv 20 %, {under}"
            out.append(Aim(what, ratio(*pair), 0.95 if name == "2048x8" else None))
    for policy, aim in PEERS.items():
        peer, mine = everybody.get(f"kvpress {policy} 20 %"), everybody.get(ours(policy, "eager").name)
        if peer and mine:
            what = f"{name}: kvpress' step against ours, {policy} 20 %, eager"
            out.append(Aim(what, ratio(peer, mine), aim if name == "2048x8" else None))
    control = everybody.get("HF dynamic, kvpress' environment"), everybody.get(hf("dynamic", "eager").name)
    if all(control):
        out.append(
            Aim(f"{name}: HF's full cache in kvpress' environment against ours (a control)", ratio(*control), None)
        )
    wrong = sum(checked(one, result).startswith(("WRONG", "TOO")) for one in everybody.values())
    return [*out, Aim(f"{name}: contenders whose answers or bytes are wrong", wrong, 0, least=False, unit="")]


def best(everybody: dict[str, Any], policy: str | None) -> dict[str, Any] | None:
    """The fastest contender of a policy."""
    of = [one for one in everybody.values() if "spec" in one and one["spec"]["policy"] == policy]
    return min(of, key=middle, default=None)


def ratio(over: Any, under: Any) -> float:
    return median_ratio(over["step_s"], under["step_s"])
