"""`make bench ARGS=--first-token`: how long a user waits for the first token, and how much of it is compiling.

Each contender runs in fresh processes: twice with the same, at first empty folder for Inductor's caches (cold, warm),
or once where nothing is cached. Writes docs/first-token.md and the figures beside the other results; with --quick a
tiny random model and no page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import machine

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT, TOKENS = 512, 8
CONTENDERS = (
    ("HF, no compiler", None, ""),
    ("torch.compile, inductor", None, "inductor"),
    ("kvpass h2o 20 %, eager", "h2o", "eager"),
    ("kvpass h2o 20 %, inductor", "h2o", "inductor"),
)


class Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self) -> None:
        self.start, self.times = time.perf_counter(), []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass


def measure(policy: str | None, inner: str, tiny: bool) -> dict[str, Any]:
    """In a process of its own: seconds from the call of `generate` to each token, and what they went into."""
    import torch

    model, ids = _tiny() if tiny else _smollm2()
    loaded = time.perf_counter()
    compiled = _compiled(model, policy, inner)
    clock = Clock()
    mask = torch.ones_like(ids)
    compiled.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, streamer=clock)
    from torch._dynamo.utils import counters

    times = clock.times[1:]  # the prompt itself is put first
    return {
        "first_token_s": times[0],
        "second_token_s": times[1] - times[0],
        "all_tokens_s": times[-1],
        "last_step_s": times[-1] - times[-2],
        "to_compile_s": clock.start - loaded,
        "stages": getattr(getattr(compiled, "kvpass", None), "timings", {}),
        "graphs": len(getattr(getattr(compiled, "kvpass", None), "graphs", [])),
        "cache": {kind: dict(found) for kind, found in counters.items() if kind in ("inductor", "aot_autograd")},
    }


def _compiled(model: Any, policy: str | None, inner: str) -> Any:
    if policy is not None:
        import kvpass

        return kvpass.compile(model, policy, 0.2, inner=inner)
    if inner:
        model.compile(backend=inner)
    return model


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


def run_case(policy: str | None, inner: str, tiny: bool, cache: str) -> dict[str, Any]:
    """One fresh process; its progress lines go to stderr."""
    command = [sys.executable, "-P", __file__, json.dumps([policy, inner, tiny])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(out: Path, quick: bool) -> None:
    results: list[dict[str, Any]] = []
    for name, policy, inner in CONTENDERS:
        with tempfile.TemporaryDirectory(prefix="kvpass-first-token-", ignore_cleanup_errors=True) as cache:
            for state in ("cold", "warm") if inner == "inductor" else ("cold",):
                print(f"{name}, {state} ...", flush=True)
                figures = run_case(policy, inner, quick, cache)
                results.append({"name": name, "state": state if inner == "inductor" else "", **figures})
    written = {"date": date.today().isoformat(), "machine": machine.describe(), "tiny": quick, "results": results}
    name = f"{written['date']}-first-token-{machine.slug(machine.describe())}{'-quick' if quick else ''}.json"
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(json.dumps(written, indent=1) + "\n")
    page = table(written)
    print(page)
    if not quick:
        (ROOT / "docs" / "first-token.md").write_text(page)
    print(f"wrote {out / name}" + ("" if quick else " and docs/first-token.md"))


def table(written: dict[str, Any]) -> str:
    """The page: what a user waits for, contender by contender."""
    what = "a tiny random Llama" if written["tiny"] else "SmolLM2-135M-Instruct, float32"
    on = written["machine"]
    made = (
        f"Made by `make bench ARGS=--first-token` on {written['date']}: {what}, a prompt of {PROMPT} tokens, "
        f"`generate` in a fresh process, {on['threads']} threads of {on['cpu']}, torch {on['torch']}, transformers "
        f"{on['transformers']}. Seconds from the call of `generate`. Cold: Inductor's caches are empty. Warm: the "
        "process before filled them. Loading the model is not counted."
    )
    lines = ["# How long until the first token", "", made, ""]
    lines += [
        "| | caches | first token | second token | after 8 tokens | tracing (Dynamo) | inner compiler | graphs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in written["results"]:
        stages = one["stages"]
        times = (one["first_token_s"], one["second_token_s"], one["all_tokens_s"])
        parts = [f"{stages[key]:.1f}" if key in stages else "" for key in ("capture", "inner")]
        cells = [one["name"], one["state"], *(f"{t:.1f}" for t in times), *parts, str(one["graphs"] or "")]
        lines.append("| " + " | ".join(cells) + " |")
    why = (
        "The second token compiles the decode step, which then serves all tokens. Tracing and inner compiler are sums "
        "over all graphs. Why layers that are alike are compiled once: [design/0006](design/0006-first-token.md)."
    )
    return "\n".join([*lines, "", why]) + "\n"


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
