"""A step's time as the context grows at a fixed number of slots, beside a full cache.

kvpass reads a long text in chunks, at 1,024 slots for each head; at each length the cache is copied and kept, and then
steps are timed at all lengths in turns. The full caches are Hugging Face's, of random keys and values: their contents
cost nothing, and reading the text would cost its square.
"""

from __future__ import annotations

import copy
from typing import Any

import smollm2
import torch
from spelling import cache_of, with_cache
from transformers import DynamicCache
from workers import say

import kvpass
from bench.contenders import prompt
from bench.suite import Aim, Grid, Job, Options, Results, Save
from bench.timing import quartiles, timed, turned, without_gc

MINUTES = 2
SLOTS, LENGTHS, CHUNK = 1024, (1024, 2048, 4096, 8192, 16384, 32768), 1024
FULL_UP_TO = 16384
WARM_UP = 4
POLICIES = ("h2o", "streaming_llm")


def jobs(options: Options) -> list[Job]:
    if options.quick:
        sizes = {"slots": 64, "lengths": [128, 256, 512], "chunk": 128, "layers": 2}
    else:
        sizes = {"slots": SLOTS, "lengths": list(LENGTHS), "chunk": CHUNK, "layers": None}
    return [
        {
            "name": "lengths",
            **sizes,
            "policies": list(POLICIES if options.long else POLICIES[:1]),
            "rounds": options.rounds_or(20),
        }
    ]


class Going:
    """A model and a cache at some length, that takes steps."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache

    def step(self, token: torch.Tensor) -> None:
        out = self.model(input_ids=token, **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1)
        self.cache = cache_of(out)
        out.logits.argmax(-1)


def work(job: Job, save: Save) -> dict[str, Any]:
    device = job["device"]
    model, tokenizer = smollm2.load(layers=job["layers"])
    model.to(device)
    ids = prompt(tokenizer, job["lengths"][-1] + WARM_UP + job["rounds"], 1).to(device)
    going: dict[tuple[str, int], Going] = {}
    held: dict[str, list[int]] = {}
    for policy in job["policies"]:
        compiled = kvpass.compile(model, policy, job["slots"], inner="eager")
        cache: Any = None
        for end in range(job["chunk"], job["lengths"][-1] + 1, job["chunk"]):
            say(f"{policy}: {end:,} tokens")
            given = {"input_ids": ids[:, end - job["chunk"] : end], **with_cache(compiled, cache), "logits_to_keep": 1}
            cache = cache_of(compiled(**given, use_cache=True))
            if end in job["lengths"]:
                going[policy, end] = Going(compiled, copy.deepcopy(cache))
                held.setdefault(policy, []).append(kvpass.report(cache).to_dict()["bytes"])
    for length in (length for length in job["lengths"] if length <= FULL_UP_TO):
        going["HF full", length] = Going(model, random_cache(model, length, device))
    tokens = ids[:, job["lengths"][-1] :].split(1, dim=1)
    for one in going.values():
        for token in tokens[:WARM_UP]:
            one.step(token)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in going}
    with without_gc():
        for number, token in enumerate(tokens[WARM_UP:]):
            say(f"round {number + 1} of {job['rounds']}")
            for key in turned([*going], number):
                seconds[key].append(timed(lambda k=key, t=token: going[k].step(t), device))
    steps = {name: {} for name, _ in going}
    for (name, length), times in seconds.items():
        steps[name][str(length)] = times
    return {"slots": job["slots"], "lengths": job["lengths"], "held": held, "step_s": steps}


def random_cache(model: Any, length: int, device: str) -> DynamicCache:
    config = model.config
    cache, shape = DynamicCache(config=config), (1, config.num_key_value_heads, length, config.head_dim)
    for at in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2)), at)
    return cache


def grids(found: Results) -> list[Grid]:
    grids = []
    for result in found.values():
        rows = []
        for name, at in result["step_s"].items():
            times = [f"{1e3 * quartiles(at[str(n)])[1]:.1f}" if str(n) in at else "" for n in result["lengths"]]
            held = result["held"].get(name)
            check = "" if held is None else "ok" if len(set(held)) == 1 else f"WRONG: {held} bytes"
            rows.append([name, *times, f"{growth(at):.2f}x" if name in result["held"] else "", check])
        columns = ("step, ms, at", *(f"{n:,}" for n in result["lengths"]), "last / first", "check")
        title = f"Growth with context: {result['slots']:,} slots for each head, batch 1, eager"
        grids.append(Grid(title, columns, rows, "check: bytes held do not grow"))
    return grids


def growth(at: dict[str, list[float]]) -> float:
    """Time at the longest context over that at the shortest, median of rounds."""
    lengths = sorted(at, key=int)
    first, last = (quartiles(at[length])[1] for length in (lengths[0], lengths[-1]))
    return last / first


def aims(found: Results) -> list[Aim]:
    out = []
    for result in found.values():
        lengths = result["lengths"]
        asked = tuple(lengths) == LENGTHS
        worst = max(growth(result["step_s"][name]) for name in result["held"])
        what = f"growth of a step, {lengths[0]:,} to {lengths[-1]:,} tokens at {result['slots']:,} slots"
        out.append(Aim(what, 100 * (worst - 1), 3 if asked else None, least=False, unit=" %"))
    return out
