"""What a mask costs that is read: attention with statistics, with a mask as a tensor beside the same in words.

    python -P examples/bench/masks.py [--tokens 4096] [--policies full,h2o,snapkv] [--rounds 9]

One layer of 9 query and 3 KV heads of 64 on the CPU. Words: `causal`, and columns that hold tokens as bool [1, T] where
padding stands among them. The tensors are bool or additive [1, 1, T, T]; `bias` adds numbers besides, which no words
say, and is set beside plain `causal`. `bounds` are given, as graphs find them once for all layers. One thread; all take
turns; medians and ratios of its CPU seconds, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from kvpass.kernels.attention.visibility import mask_spans, token_bounds
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rule import Rule
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

HEADS, KV_HEADS, DIM = 9, 3, 64


def said(tokens: int) -> dict[str, tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]:
    """What is given: as a tensor, and in words, by the name of the mask."""
    g = torch.Generator().manual_seed(0)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    real = torch.rand(1, tokens, generator=g) > 0.1
    real[:, : tokens // 8] = False
    padded = causal & real[:, None, None]
    added = torch.zeros(1, 1, tokens, tokens).masked_fill_(~causal, torch.finfo(torch.float32).min)
    bias = torch.where(causal, torch.randn(1, 1, tokens, tokens, generator=g), added)
    none: dict[str, Tensor | None] = {}
    words: dict[str, Tensor | None] = {"tokens": real, "bounds": token_bounds(real, 0, tokens)}
    read = {
        "causal, bool": (causal, none),
        "causal, additive": (added, none),
        "padding among tokens, bool": (padded, words),
        "bias": (bias, none),
    }
    return {name: ({"mask": mask, "bounds": mask_spans(mask)}, other) for name, (mask, other) in read.items()}


def seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--policies", default="full,h2o,snapkv")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, args.tokens, DIM, generator=g) for n in (HEADS, KV_HEADS, KV_HEADS))
    print("| policy | mask | tensor, ms | words, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for name in args.policies.split(","):
        rule = Rule() if name == "full" else rule_of(Policy.load(name).with_budget(0.2))

        def attend(sees: str, mask: Tensor | None = None, text: str = rule.encode(), **given: Tensor | None) -> None:
            prefill_attend(q, k, v, None, mask, DIM**-0.5, sees, text, **given)

        for what, (tensor, words) in said(args.tokens).items():
            times = [
                (seconds(lambda t=tensor: attend("", **t)), seconds(lambda w=words: attend("causal", **w)))
                for _ in range(args.rounds + 1)
            ][1:]
            read, proved = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            print(f"| {name} | {what} | {read:.0f} | {proved:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
