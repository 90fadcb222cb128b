"""How long a user waits for the first token, and how much of it is compiling: cold and warm.

Each contender generates in fresh processes: twice with the same, at first empty folder for Inductor's caches (cold,
warm), or once where nothing is cached. Loading the model is not counted. The tokens of one inner compiler are those of
another: a full cache's Hugging Face's, a policy's its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.suite import Aim, Grid, Job, Options, Results, Save

MINUTES = 5
PROMPT, TOKENS = 512, 8
CONTENDERS = (
    ("HF, no compiler", None, "eager"),
    ("torch.compile, inductor", None, "inductor"),
    ("kvpass h2o 20 %, eager", "h2o", "eager"),
    ("kvpass h2o 20 %, inductor", "h2o", "inductor"),
    ("kvpass h2o 20 %, frozen", "h2o", "frozen"),
)


def jobs(options: Options) -> list[Job]:
    if options.device != "cpu":
        return []
    some = (CONTENDERS[0], CONTENDERS[2]) if options.quick else CONTENDERS if options.long else CONTENDERS[:4]
    named = [one for one in some if options.only in one[0]]
    return [{"name": name, "policy": policy, "under": under, "tiny": options.quick} for name, policy, under in named]


def work(job: Job, save: Save) -> dict[str, Any]:
    states = ("cold",) if job["under"] == "eager" else ("cold", "warm")
    with tempfile.TemporaryDirectory(prefix="kvpass-first-token-", ignore_cleanup_errors=True) as cache:
        return {"states": {state: fresh_process(job, cache) for state in states}}


def fresh_process(job: Job, cache: str) -> dict[str, Any]:
    """One generation; its progress lines go to stderr."""
    command = [sys.executable, "-P", __file__, json.dumps([job["policy"], job["under"], job["tiny"]])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self) -> None:
        self.start, self.times = time.perf_counter(), list[float]()
        self.said: list[int] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter() - self.start)
        self.said += value.flatten().tolist() if len(self.times) > 1 else []  # the prompt itself is put first

    def end(self) -> None:
        pass


def measure(policy: str | None, under: str, tiny: bool) -> dict[str, Any]:
    """In a process of its own: seconds from the call of `generate` to each token, and what they went into."""
    import torch

    from bench.contenders import hf, ours, prepare, tracing

    model, ids = _tiny() if tiny else _smollm2()
    loaded = time.perf_counter()
    spec = ours(policy, under) if policy is not None else hf("dynamic", under)
    compiled = prepare(model, spec)
    if policy is None and under != "eager":
        model.compile(backend=spec.inner)  # generate is bound to the model itself
        compiled = model
    clock = Clock()
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with tracing(spec):
        compiled.generate(ids, **given, do_sample=False, streamer=clock)
    times = clock.times[1:]
    return {
        "first_token_s": times[0],
        "second_token_s": times[1] - times[0],
        "all_tokens_s": times[-1],
        "last_step_s": times[-1] - times[-2],
        "to_compile_s": clock.start - loaded,
        "stages": dict(getattr(getattr(compiled, "kvpass", None), "timings", {})),
        "graphs": len(getattr(getattr(compiled, "kvpass", None), "graphs", [])),
        "said": clock.said,
    }


def _smollm2() -> tuple[Any, Any]:
    from smollm2 import load, text

    model, tokenizer = load()
    return model, tokenizer(text(8 * PROMPT), return_tensors="pt")["input_ids"][:, :PROMPT]


def _tiny() -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    config = LlamaConfig(hidden_size=64, intermediate_size=128, vocab_size=200, **heads)
    return LlamaForCausalLM(config).eval(), torch.randint(3, 200, (1, 64))


def grids(found: Results) -> list[Grid]:
    rows = []
    policies = {name: policy for name, policy, _ in CONTENDERS}
    first: dict[str | None, list[int]] = {}
    for name, result in found.items():
        for state, one in result["states"].items():
            stages, said = one["stages"], first.setdefault(policies[name], one["said"])
            times = (one["first_token_s"], one["second_token_s"], one["all_tokens_s"])
            tracing = [f"{stages[key]:.1f}" if key in stages else "" for key in ("capture", "inner")]
            same = "ok" if one["said"] == said else "WRONG: other tokens"
            state = state if len(result["states"]) > 1 else ""
            rows.append([name, state, *(f"{t:.1f}" for t in times), *tracing, str(one["graphs"] or ""), same])
    columns = (
        "", "caches", "first token, s", "second, s", f"all {TOKENS}, s", "tracing", "inner compiler", "graphs", "check",
    )  # fmt: skip
    note = (
        "The second token compiles the step, which serves all later ones. Why layers that are alike are compiled once: "
    )
    note += "docs/design/0006-first-token.md."
    return [Grid(f"Until the first token: a prompt of {PROMPT} tokens, fresh processes", columns, rows, note)]


def aims(found: Results) -> list[Aim]:
    def all_tokens(name: str, state: str) -> float | None:
        result = found.get(name, {"states": {}})["states"].get(state)
        return result["all_tokens_s"] if result else None

    out = []
    for state in ("cold", "warm"):
        theirs, mine = (all_tokens(CONTENDERS[at][0], state) for at in (1, 3))
        if theirs and mine:
            out.append(
                Aim(f"{TOKENS} tokens, {state}: torch.compile of HF's against kvpass, inductor", theirs / mine, None)
            )
    return out


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
