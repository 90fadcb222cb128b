"""`make quantized`: caches of few bits side by side: kvpass with `store` alone, and Hugging Face's QuantizedCache.

    python -P examples/bench/quantized.py [--context 1024] [--batch 1] [--steps 64] [--inner eager]

SmolLM2-135M-Instruct on real text; nothing is evicted. All contenders take each step one after the other, so that a
slow minute is everybody's. Backends of Hugging Face's cache that are not installed are named and left out:
`pip install optimum-quanto hqq`. Writes docs/quantized.md and examples/bench/results/quantized.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
import torch
from quality.prompts import Prompts
from quality.reference import call
from quality.shown import table
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache
from transformers.utils import logging as transformers_logging
from workers import wide_console

import kvpass
from bench import machine

ROOT = Path(__file__).resolve().parent.parent.parent
STORES = ("int8", "fp8_e4m3", "int4", "int2")
PEERS = {
    "fp8": ({"backend": "fp8"}, None),
    "quanto int4": ({"backend": "quanto", "nbits": 4}, "optimum"),
    "quanto int2": ({"backend": "quanto", "nbits": 2}, "optimum"),
    "hqq int4": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}, "hqq"),
}
"""Arguments of QuantizedCache, with its own defaults for groups (64) and residual (128 tokens), and what it imports."""


@dataclass
class Contender:
    """One cache, and what was measured of it.

    Attributes:
        model: takes the calls.
        cache: of the model.
        held: bytes of a cache.
        seconds: of each step.
        logp: log-probabilities after each step, `[B, V]`.
    """

    name: str
    model: Any
    cache: Any
    held: Callable[[Any], int]
    seconds: list[float] = field(default_factory=list)
    logp: list[torch.Tensor] = field(default_factory=list)

    def step(self, tokens: torch.Tensor) -> None:
        start = time.perf_counter()
        found = call(self.model, tokens, self.cache)
        self.seconds.append(time.perf_counter() - start)
        self.logp.append(found)


def tensors_in(value: Any, seen: set[int], depth: int = 0) -> Iterator[torch.Tensor]:
    """All plain tensors of a cache object, each memory once; tensors made of others by their parts."""
    if id(value) in seen or depth > 8:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from (one for name in names for one in tensors_in(getattr(value, name), seen, depth + 1))
        elif value.numel() and value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            yield value
    elif isinstance(value, dict):
        yield from (one for part in value.values() for one in tensors_in(part, seen, depth + 1))
    elif isinstance(value, (list, tuple)):
        yield from (one for part in value for one in tensors_in(part, seen, depth + 1))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
        yield from tensors_in(vars(value), seen, depth + 1)


def bytes_in(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(cache.layers, set()))


def bytes_of_ours(cache: Any) -> int:
    report = kvpass.report(cache).to_dict()
    return int(report["bytes"] + report["overhead_bytes"])


def contenders(model: Any, inner: str, say: Callable[[str], None]) -> list[Contender]:
    """The full caches of both first."""
    found = [Contender("HF DynamicCache", model, DynamicCache(config=model.config), bytes_in)]
    for name, (options, needs) in PEERS.items():
        if needs is not None and find_spec(needs) is None:
            say(f"HF {name}: left out, {needs} is not installed")
            continue
        found.append(Contender(f"HF {name}", model, QuantizedCache(config=model.config, **options), bytes_in))
    for store in ("dense", *STORES):
        policy = "full" if store == "dense" else {"store": store}
        compiled = kvpass.compile(copy.deepcopy(model), policy, inner=inner)
        name = f"kvpass {'full' if store == 'dense' else store}"
        found.append(Contender(name, compiled, DynamicCache(config=model.config), bytes_of_ours))
    return found


def row(one: Contender, full: Contender, warm: int) -> dict[str, Any]:
    """Step times without the first ones, in which graphs are compiled."""
    pairs = list(zip(full.logp, one.logp, strict=True))
    kl = torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in pairs])
    same = torch.stack([(a.argmax(-1) == b.argmax(-1)).float().mean() for a, b in pairs])
    return {
        "name": one.name,
        "step_ms": 1e3 * statistics.median(one.seconds[warm:]),
        "against_full": statistics.median(one.seconds[warm:]) / statistics.median(full.seconds[warm:]),
        "bytes": one.held(one.cache),
        "share": one.held(one.cache) / full.held(full.cache),
        "kl": float(kl.mean()),
        "same": float(same.mean()),
    }


READ = """Nothing is evicted. `step`: median, contenders take turns. `held`: all bytes, scales, positions and whole
tokens counted. `KL`: nats to the full cache, mean over steps. Hugging Face's integer backends keep up to 128 newest
tokens whole and round everything again when those are full; kvpass keeps 32 and the first 4, and rounds once."""
HEAD = ["cache", "step, ms", "of HF's full cache", "held, MB", "of the full cache", "KL", "same token"]


def page(data: dict[str, Any]) -> str:
    facts, s = data["machine"], data["settings"]
    said = f"`{data['command']}`: SmolLM2-135M-Instruct, float32, {s['context']:,} tokens of prompt x {s['batch']}, "
    said += f"{s['steps']} steps along real text, inner compiler `{s['inner']}`; torch {facts['torch']}, "
    said += f"transformers {facts['transformers']}; {facts['cpu']}, {facts['threads']} thread(s). {s['note']}".rstrip()
    cells = [
        [
            r["name"],
            f"{r['step_ms']:.1f}",
            f"{r['against_full']:.2f}x",
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['share']:.1%}",
            f"{r['kl']:.5f}",
            f"{r['same']:.1%}",
        ]
        for r in data["rows"]
    ]
    lines = ["<!-- Generated by `make quantized`: do not edit. -->", "# Caches of few bits", "", said, "", READ, ""]
    return "\n".join([*lines, *table(HEAD, cells), *(f"\n{note}" for note in data["left_out"]), ""])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--warm", type=int, default=6, help="first steps whose times are left out")
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--note", default="", help="a sentence for the page, e.g. what else ran")
    args, console = parser.parse_args(), wide_console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, tokenizer = smollm2.load()
    prompts = Prompts(tokenizer, 0)
    rows = torch.tensor([prompts.plain(args.context, i, args.steps) for i in range(args.batch)])
    left_out: list[str] = []
    everybody = contenders(model, args.inner, left_out.append)
    for one in everybody:
        console.print(f"{one.name}: prompt", highlight=False)
        call(one.model, rows[:, : args.context], one.cache)
    for at in range(args.context, args.context + args.steps):
        for one in everybody:
            one.step(rows[:, at : at + 1])
    found = [row(one, everybody[0], args.warm) for one in everybody]
    data = {
        "command": shlex.join(["python", "-P", "examples/bench/quantized.py", *sys.argv[1:]]),
        "machine": machine.describe(), "settings": vars(args), "rows": found, "left_out": left_out,
    }  # fmt: skip
    (ROOT / "examples/bench/results/quantized.json").write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs/quantized.md").write_text(page(data))
    console.print(page(data), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
