"""prefill_attend against torch's own attention, one layer: in C++ and in torch's operations, in turns.

    python -P tests/support/prompt_speed.py [--threads 1] [--rounds 7] [--tokens 4096] [--dtype float32]

Products: twice the multiplications that a causal softmax(q k) v needs, over the time. Shapes are SmolLM2's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kvpass.kernels import choose
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rule import Rule

QUERY_HEADS, HEADS, DIM, SCALE = 9, 3, 64, 0.125
RULES = {
    "nothing observed": Rule(),
    "the last 32 (snapkv)": Rule(stats=("sum", "count"), queries=32),
    "all, sums (h2o)": Rule(stats=("sum",), queries=-1),
    "all, sums and squares (roco)": Rule(stats=("sum", "sumsq", "count"), queries=-1),
    "all, highest of a group": Rule(stats=("sum",), queries=-1, group="max"),
}


def contenders(batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(batch, tokens, h, DIM, generator=g).to(dtype).transpose(1, 2) for h in (QUERY_HEADS, HEADS, HEADS)
    )
    found: dict[str, Callable[[], Any]] = {
        "torch's attention": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
        )
    }
    for name, rule in RULES.items():
        for how in ("native", "reference"):
            found[f"{name}, {how}"] = run(how, q, k, v, rule.encode())
    return found


def run(how: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: str) -> Callable[[], Any]:
    def one() -> Any:
        with choose.use(how):
            return prefill_attend(q, k, v, None, None, SCALE, "causal", rule)

    return one


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--tokens", type=int, default=4096)
    asked.add_argument("--batch", type=int, default=1)
    asked.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{options.tokens:,} tokens x {options.batch}, {options.dtype}")
    everybody = contenders(options.batch, options.tokens, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in everybody}
    with torch.no_grad():
        for number in range(options.rounds + 1):
            for name, one in everybody.items():
                start = time.perf_counter()
                one()
                if number:  # the first call compiles
                    times[name].append(time.perf_counter() - start)
    middle = {name: sorted(own)[len(own) // 2] for name, own in times.items()}
    alone, work = middle["torch's attention"], 2.0 * options.batch * QUERY_HEADS * options.tokens**2 * DIM
    print("| one layer | ms | of torch's attention | GFLOP/s |\n| --- | --- | --- | --- |")
    for name, seconds in middle.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / alone:.2f} | {work / seconds / 1e9:.0f} |")


if __name__ == "__main__":
    main()
