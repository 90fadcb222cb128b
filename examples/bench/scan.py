"""`make bench ARGS=--scan`: how long finding the sites takes in models of 100 layers. Asserts nothing.

Writes scan.md and scan.json to examples/bench/results.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from spelling import cache_of, with_cache
from torch import Tensor, fx, nn

from bench import machine

LAYERS, REPEATS = 100, 5
HEADS, KV_HEADS, DIM = 4, 2, 8
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """Grouped heads, a tuple cache grown by cat, attention written out, a mask made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * DIM), nn.Linear(WIDTH, KV_HEADS * DIM)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t.view(*x.shape[:2], -1, DIM).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        group, new, whole = HEADS // KV_HEADS, q.shape[2], k.shape[2]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / DIM**0.5
        future = torch.arange(whole) > torch.arange(whole - new, whole)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        y = weights @ v.repeat_interleave(group, 1)
        return x + self.o(y.transpose(1, 2).flatten(2)), (k, v)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        grown = []
        for layer, past in zip(self.layers, cache, strict=True):
            x, pair = layer(x, past)
            grown.append(pair)
        return x, grown


def plain_decoder() -> Callable[[], Any]:
    shape = (1, KV_HEADS, 7, DIM)
    model, cache = Decoder().eval(), [(torch.randn(shape), torch.randn(shape)) for _ in range(LAYERS)]
    return lambda: torch.compile(model, backend=_backend)(torch.randn(1, 1, WIDTH), cache)


def llama() -> Callable[[], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(1, 9)[None]
    cache = cache_of(model(ids))
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 0] = 0
    return lambda: torch.compile(model, backend=_backend)(ids[:, :1], **with_cache(model, cache), attention_mask=mask)


_GRAPHS: list[fx.GraphModule] = []


def _backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
    _GRAPHS.append(gm)
    return gm.forward


def measured(name: str, make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """One capture, several scans of its only graph."""
    from kvpass.patterns import DEFAULT

    from kvpass.sites.scan import scan

    _GRAPHS.clear()
    with torch.no_grad():
        make()()
    (gm,) = _GRAPHS
    seconds, busy = [], []
    for _ in range(REPEATS):
        start, started = time.perf_counter(), time.process_time()
        table = scan(gm, DEFAULT)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - started)
    return {
        "model": name,
        "layers": LAYERS,
        "nodes": len(gm.graph.nodes),
        "sites": len(table.sites),
        "declined": len(table.declined),
        "scan_s": seconds,
        "cpu_s": busy,
        "median_s": statistics.median(seconds),
        "cpu_median_s": statistics.median(busy),
    }


def table_of(results: dict[str, Any]) -> str:
    facts = results["machine"]
    rows = [
        f"| {row['model']} | {row['layers']} | {row['nodes']} | {row['sites']} "
        f"| {row['median_s']:.2f} | {row['cpu_median_s']:.2f} |"
        for row in results["rows"]
    ]
    head = (
        f"`make bench ARGS=--scan`, {results['date']}: {facts['cpu']}, {facts['threads']} thread(s), "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}; "
        f"median of {REPEATS} scans of one captured decode graph."
    )
    columns = ["| model | layers | nodes | sites found | scan, s | of it CPU, s |"]
    columns.append("| --- | --- | --- | --- | --- | --- |")
    return "\n".join([head, "", *columns, *rows, ""])


def main(out: Path) -> None:
    made = {"plain decoder, attention written out": plain_decoder, "llama, SDPA, padded": llama}
    rows = [measured(name, make) for name, make in made.items()]
    results = {"date": date.today().isoformat(), "machine": machine.describe(), "rows": rows}
    (out / "scan.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "scan.md").write_text(table_of(results))
    sys.stdout.write(table_of(results))
