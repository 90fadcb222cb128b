"""decode_attend against the machine's read bandwidth: even and ragged heads, in C++ and in torch.

    python -P tests/support/step_bandwidth.py [--threads 1] [--rounds 10] [--only native]

Contenders take turns layer by layer, so that all meet the same machine; of the times of single layers the 25th
percentile is told, which other work on the machine moves little. Shapes are SmolLM2's under a budget of 20 %.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from kvpass.kernels import choose
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, FIRST, FREE, LIVE, SEEN, SHIFT
from kvpass.kernels.slots.ragged import laid_out
from kvpass.kernels.slots.state import State

HOW = "native", "reference"

LAYERS, QUERY_HEADS, HEADS, DIM, SCALE = 30, 9, 3, 64, 0.125

BUDGET: dict[str, Any] = {"num": 1, "den": 5}
SNAPKV = Rule(stats=("sum", "count"), queries=32, decode="add", score="mean", recent=32, **BUDGET)
RULES = {
    "h2o": Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, **BUDGET),
    "snapkv": SNAPKV,
    "ada_snapkv": SNAPKV.replace(ragged=True),
}


def filled(rule: Rule, batch: int, tokens: int, generator: torch.Generator) -> State:
    """A state after so many tokens, at its budget; ragged heads hold half to one and a half of it."""
    budget, ragged = tokens // 5, bool(rule.replace(ragged=False) != rule)
    live = torch.full((batch, HEADS), budget)
    if ragged:
        shift = torch.randint(-budget // 2, budget // 2, (batch, HEADS - 1), generator=generator)
        live = torch.cat([live[:, :-1] + shift, live[:, -1:] - shift.sum(1, keepdim=True)], 1).clamp(min=8)
    cursor = torch.zeros(batch, HEADS, 6 if ragged else 4, dtype=torch.int32)
    cursor[..., LIVE], cursor[..., FREE], cursor[..., SEEN], cursor[..., FIRST] = live.int(), live.int(), tokens, 0
    slots = budget + max(1, budget // 40)
    if ragged:
        cursor[..., EXTRA] = (live - budget).int()
        cursor, slots, _ = laid_out(cursor, max(1, budget // 40))
    state = State.empty(rule, torch.empty(0), B=batch, H=HEADS, C=slots, D=DIM, V=DIM).replaced(cursor=cursor)
    for tensor in (state.k, state.v):
        tensor.normal_(generator=generator)
    state.stats.uniform_(1.0, 3.0, generator=generator)
    flat = state.pos.view(-1)
    for i, n in enumerate(live.flatten().tolist()):
        first = i * slots + (int(cursor.view(-1, 6)[i, SHIFT]) if ragged else 0)
        flat[first : first + n] = torch.randperm(tokens, generator=generator)[:n].sort().values.int()
    return state


def used_bytes(state: State) -> int:
    """Keys and values that a step reads."""
    return int((state.cursor[..., LIVE] + 1).sum()) * 2 * DIM * state.k.element_size()


def steps(rule: Rule, how: str, states: list[State], batch: int, tokens: int) -> Callable[[int, int], None]:
    """A step of one layer, in one round."""
    q, k, v = torch.randn(batch, QUERY_HEADS, 1, DIM), *torch.randn(2, batch, HEADS, 1, DIM)
    text = rule.encode()

    def one(layer: int, number: int) -> None:
        with choose.use(how):
            decode_attend(q, k, v, None, states[layer].tensors(), tokens + number, SCALE, text)

    return one


def measured(batch: int, tokens: int, rounds: int, implementations: list[str]) -> None:
    g = torch.Generator().manual_seed(1)
    contenders: dict[str, Callable[[int, int], Any]] = {}
    layers = [filled(RULES["h2o"], batch, tokens, g) for _ in range(LAYERS)]
    plain = [torch.ones(used_bytes(state) // 4) for state in layers]
    contenders["read the bytes"] = lambda layer, number: plain[layer].sum()
    for name, rule in RULES.items():
        for how in implementations:
            own = [filled(rule, batch, tokens, g) for _ in range(LAYERS)]
            contenders[f"{name}, {how}"] = steps(rule, how, own, batch, tokens)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for layer in range(LAYERS):
            for name, one in contenders.items():
                start = time.perf_counter()
                one(layer, number)
                times[name].append(time.perf_counter() - start)
    size, found = used_bytes(layers[0]), {name: sorted(own)[len(own) // 4] for name, own in times.items()}
    read = found["read the bytes"]
    print(
        f"\n{tokens:,} x {batch}: {size * LAYERS / 1e6:.1f} MB in {LAYERS} layers, read at {size / read / 1e9:.1f} GB/s"
    )
    print("| one layer | microseconds | share of read bandwidth |\n| --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {seconds * 1e6:.0f} | {read / seconds:.2f} |")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--rounds", type=int, default=10)
    asked.add_argument("--only", choices=HOW, help="leave the other out: it empties caches between its turns")
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}")
    with torch.no_grad():
        for batch, tokens in ((1, 4096), (8, 2048)):
            measured(batch, tokens, options.rounds, [options.only] if options.only else [*HOW])


if __name__ == "__main__":
    main()
