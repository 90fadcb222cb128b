"""Prefill and decode of a whole model, Hugging Face's caches beside kvpass' under the same inner compilers.

8 layers of Llama-3-8B's shape with random weights, bfloat16. Contenders take turns, prefill by prefill and
step by step.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench.contenders import Contender, Spec
from gpu.device import DEVICE, GPU, synchronize, timed, triton
from gpu.record import Record, left
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = ((8, 4096), (1, 16384)) if GPU else ((1, 16),)
"""Batch, tokens."""
PREFILLS, STEPS, WARM_UP = (3, 20, 4) if GPU else (1, 2, 1)
"""By the last warm-up step the first decode (static lengths) and the general one are compiled."""
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LAYERS = 8 if GPU else 1
MEASURING, COMPILING = 20, 25
"""Seconds kept for the timed rounds of a shape; seconds that one more contender may need."""


class Static(Contender):
    """Hugging Face's static cache: an eager prefill, then steps that torch.compile compiled in this mode."""

    def __init__(self, spec: Spec, model: Any, max_length: int, mode: str) -> None:
        super().__init__(spec, model, max_length)
        self.plain = self.stepping = model
        if GPU:
            self.stepping = copy.copy(model)
            self.stepping.compile(mode=mode)

    def prefill(self, ids: torch.Tensor) -> None:
        self.model = self.plain
        super().prefill(ids)
        self.model = self.stepping


def contenders() -> list[tuple[str, Callable[[Any, int], Contender]]]:
    """The most telling first: the last ones are left out where time is short."""
    made: list[tuple[str, Callable[[Any, int], Contender]]] = []

    def add(spec: Spec, kind: Callable[..., Contender] = Contender, **options: Any) -> None:
        made.append((spec.name, partial(kind, spec, **options)))

    add(Spec("HF dynamic, eager", "eager"))
    add(Spec("HF static, torch.compile", "eager", static=True), Static, mode="default")
    if GPU:
        add(Spec("HF static, reduce-overhead", "eager", static=True), Static, mode="reduce-overhead")
    for policy, budget in (("full", 1.0), ("h2o", 0.2)) if GPU else ():
        name = f"kvpass {policy}, reduce-overhead" if policy == "full" else f"kvpass {policy} 20 %, reduce-overhead"
        add(Spec(name, "inductor", policy, budget, mode="reduce-overhead"))
    for inner in ("eager", "inductor") if GPU else ("eager",):
        add(Spec(f"kvpass full, {inner}", inner, "full"))
        for policy in ("h2o", "snapkv", "streaming_llm") if GPU else ("h2o",):
            add(Spec(f"kvpass {policy} 20 %, {inner}", inner, policy, 0.2))
    return made


def build() -> Any:
    config = LlamaConfig(**(LLAMA_3_8B if GPU else TINY), num_hidden_layers=LAYERS)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if GPU else torch.float32).eval()


class Peak:
    """Bytes that a call takes beyond what was there before it; 0 on a CPU, which does not count them."""

    def __init__(self) -> None:
        self.bytes = 0

    def measured(self, call: Callable[[], Any]) -> float:
        """Seconds of the call."""
        if not GPU:
            return timed(call)
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(call)
        self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() - before)
        return seconds


class Measured:
    """A contender that has run once, and its figures."""

    def __init__(self, contender: Contender, ids: torch.Tensor) -> None:
        self.contender, self.ids = contender, ids
        self.first = [timed(partial(contender.prefill, ids)), timed(self.warm_up)]
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.peak = Peak()

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.contender.step()

    def prefill(self) -> None:
        self.contender.cache = None  # else the old one would count as what was there before
        self.prefills.append(self.peak.measured(partial(self.contender.prefill, self.ids)))

    def step(self) -> None:
        self.steps.append(timed(self.contender.step))

    def row(self, reference: list[list[int]]) -> dict[str, Any]:
        said = self.contender.said
        return {
            "prefill_ms": 1e3 * statistics.median(self.prefills),
            "step_ms": 1e3 * statistics.median(self.steps),
            "kv_bytes": self.contender.kv_bytes(),
            "peak_bytes": self.peak.bytes,
            "first_prefill_s": self.first[0],
            "first_steps_s": self.first[1],
            "same_tokens": sum(a == b for a, b in zip(reference, said, strict=True)) / len(said),
        }


def rotated(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]


def prepared(model: Any, batch: int, tokens: int, ends: float, record: Record) -> list[Measured]:
    """Those that there is time for, each run once. One that fails is a row with its error."""
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    length, ready = tokens + WARM_UP + STEPS + 1, []
    for name, make in contenders():
        row = {"batch": batch, "tokens": tokens, "contender": name}
        if time.time() > ends - MEASURING - COMPILING:
            record.add(row | {"left_out": "no time"})
            continue
        try:
            ready.append(Measured(make(model, length), ids.to(DEVICE)))
        except Exception as error:
            record.failed(row, error)
        print(name, "is ready", flush=True)
    return ready


def compete(ready: list[Measured]) -> None:
    for number in range(PREFILLS):
        for one in rotated(ready, number):
            one.prefill()
    for one in ready:
        one.warm_up()
    gc.collect()
    gc.disable()
    for number in range(STEPS):
        for one in rotated(ready, number):
            one.step()
    gc.enable()


def main() -> None:
    record = Record("end_to_end", DEVICE, model=(LLAMA_3_8B if GPU else TINY) | {"num_hidden_layers": LAYERS})
    torch._dynamo.config.recompile_limit = 64  # all contenders share the code object of the model's forward
    model = build()
    for number, (batch, tokens) in enumerate(SHAPES):
        torch._dynamo.reset()
        ready = prepared(model, batch, tokens, time.time() + left() / (len(SHAPES) - number), record)
        if ready:
            compete(ready)
        for one in ready:
            row = {"batch": batch, "tokens": tokens, "contender": one.contender.spec.name}
            record.attempt(row, partial(one.row, ready[0].contender.said))
    record.finish()


if __name__ == "__main__":
    with triton(), torch.no_grad():
        main()
