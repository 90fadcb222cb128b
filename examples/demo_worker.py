"""One contender of the demo, in a process of its own, so that its peak memory is its own.

Started by demo.py: `python -P examples/demo_worker.py JOB FOLDER`. Says on stdout what it is doing, a line
each, and writes FOLDER/<name>.json (figures) and FOLDER/<name>.pt (tokens, and the logits of every step).
"""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import smollm2
import torch
from spelling import cache_of
from task import make_inputs
from transformers import LogitsProcessor
from transformers.utils import logging as transformers_logging
from workers import say

WARM_UP = 6  # tokens; by then prefill, the first decode and the decode of any length are compiled


class Recorder(LogitsProcessor):
    """Keeps each step's logits and the time they came; with `forced`, makes generate follow those tokens."""

    def __init__(self, forced: list[int] | None = None) -> None:
        self.forced, self.times, self.logits = forced, [], []  # type: ignore[var-annotated]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self.logits.append(scores[0].float().clone())
        if self.forced is None:
            return scores
        only = torch.full_like(scores, -float("inf"))
        only[:, self.forced[len(self.times) - 1]] = 0.0
        return only


def status_bytes(field: str) -> int | None:
    """A size out of /proc/self/status, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Gives freed memory back and starts the kernel's peak counter anew; False where the system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def generate(model: Any, inputs: dict[str, Any], n: int, forced: list[int] | None = None) -> dict[str, Any]:
    """Greedy generation of up to n tokens; its tokens, cache, logits, and times."""
    recorder = Recorder(forced)
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        max_new_tokens=n,
        do_sample=False,
        logits_processor=[recorder],
        return_dict_in_generate=True,
    )
    steps = [b - a for a, b in zip(recorder.times, recorder.times[1:], strict=False)]
    return {
        "tokens": out.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        "cache": cache_of(out),
        "logits": torch.stack(recorder.logits),
        "prefill_s": recorder.times[0] - start,
        "steps_s": steps,
        "wall_s": time.perf_counter() - start,
    }


def held_bytes(cache: Any, policy: str | None) -> int:
    if policy is None:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    import kvpass

    return int(kvpass.report(cache).to_dict()["bytes"])


def agreement(reference: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """Mean KL(full cache || policy) and top-1 agreement; step 0 comes before any eviction: left out."""
    p, q = reference[1:].log_softmax(-1), logits[1:].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    top1 = p.argmax(-1) == q.argmax(-1)
    return {"kl": kl.mean().item(), "top1": top1.float().mean().item(), "tokens": len(kl)}


def compiled(model: Any, job: dict[str, Any]) -> Any:
    import kvpass

    return kvpass.compile(model, policy=job["policy"], budget=job["budget"], inner=job["inner"], debug=job["debug"])


def compare(model: Any, inputs: dict[str, Any], run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Teacher forcing: the policy's distributions over the tokens that the full cache said."""
    if run["tokens"] == reference["tokens"]:
        return agreement(reference["logits"], run["logits"])
    say("following the full cache's answer, to compare distributions")
    forced = generate(model, inputs, len(reference["tokens"]), reference["tokens"])
    return agreement(reference["logits"], forced["logits"])


def main(job: dict[str, Any], folder: Path) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    say("loading SmolLM2-135M-Instruct")
    model, tokenizer = smollm2.load()
    inputs = make_inputs(tokenizer, job["tokens"])
    if job["policy"] is not None:
        model = compiled(model, job)
    say("warming up" if job["policy"] is None else f"capturing and compiling (inner {job['inner']})")
    warm = generate(model, inputs, WARM_UP)
    del warm["cache"], warm["logits"]
    fresh_peak = reset_peak()
    idle = status_bytes("VmRSS") or 0
    say("prefill and answer, timed")
    run = generate(model, inputs, job["new_tokens"])
    result = {
        "prompt_tokens": inputs["input_ids"].shape[1],
        "answer": tokenizer.decode(run["tokens"], skip_special_tokens=True).strip(),
        "generated": len(run["tokens"]),
        "kv_bytes": held_bytes(run["cache"], job["policy"]),
        "peak_bytes": peak_bytes(),
        "peak_above_idle": peak_bytes() - idle if fresh_peak else None,
        "prefill_s": run["prefill_s"],
        "ms_per_token": 1e3 * statistics.median(run["steps_s"]),
        "compile_s": max(0.0, warm["wall_s"] - run["prefill_s"] - sum(run["steps_s"][: WARM_UP - 1])),
    }
    del run["cache"]
    if job["reference"] is not None:
        result["agreement"] = compare(model, inputs, run, torch.load(job["reference"]))
    torch.save({"tokens": run["tokens"], "logits": run["logits"]}, folder / f"{job['name']}.pt")
    (folder / f"{job['name']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
