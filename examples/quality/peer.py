"""The same cells with NVIDIA's kvpress in kvpass' place, for policies that both have.

    /path/of/kvpress/bin/python -P examples/quality/peer.py [--budgets 0.2] [--contexts 1024] [--trials 4]

Runs in an environment of kvpress' own (tests/kvpress/README.md makes one; it also needs `pip install rich` and the
converted model of an earlier `make quality`). Finished cells lie beside kvpass', as `kvpress snapkv` and so on, and
`make quality ARGS=--render` shows them in the same tables.

kvpress compresses the first call of a cache and keeps every later token; its windows and pools are its own defaults.
What its head-wise presses drop is masked: `held` is what the cache's tensors hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpress
import smollm2
import torch
from rich.progress import track
from spelling import given_cache
from transformers.utils import logging as transformers_logging

from quality.measure import Lab, measure
from quality.reference import load_or_measure
from quality.store import Cell, Settings, Store
from quality.versus import PEER

PRESSES: dict[str, Callable[[float], Any]] = {
    "random": lambda ratio: kvpress.RandomPress(ratio, seed=0),
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
    "snapkv": kvpress.SnapKVPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "lagkv": kvpress.LagKVPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "chunkkv": lambda ratio: kvpress.ChunkKVPress(kvpress.SnapKVPress(ratio)),
    "ada_snapkv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "criticalkv": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "critical_ada": lambda ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
}


class Pressed:
    """The model as the harness calls it: the first call of a cache is compressed, later ones say their positions,
    which the length of a compressed cache no longer does.
    """

    def __init__(self, model: Any, press: Any) -> None:
        self.model, self.press = model, press

    def __call__(self, ids: torch.Tensor, **given: Any) -> Any:
        cache = given_cache(given)
        start = getattr(cache, "tokens", 0)
        cache.tokens = start + ids.shape[1]
        if start == 0:
            with self.press(self.model):
                return self.model(ids, **given)
        positions = torch.arange(start, cache.tokens).expand(len(ids), -1)
        return self.model(ids, position_ids=positions, **given)


class PeerLab(Lab):
    def compiled(self, cell: Cell) -> Any:
        return Pressed(self.model, PRESSES[cell.policy.removeprefix(PEER)](1 - cell.budget))

    def capture_seconds(self, model: Any) -> float:
        return 0.0

    def held(self, cache: Any) -> dict[str, Any]:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        dense = sum(t[:, :, 0].numel() * cache.tokens * t.element_size() for t in tensors)
        held = sum(t.numel() * t.element_size() for t in tensors)
        return {"bytes": held, "dense_bytes": dense, "overhead_bytes": 0, "tokens": cache.tokens}

    def left_of(self, cache: Any, spans: list[Any]) -> None:
        return None

    def positions(self, cache: Any) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0.2")
    parser.add_argument("--contexts", default="1024")
    parser.add_argument("--trials", type=int, default=4)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    lab = PeerLab(*smollm2.load(), Settings(args.trials))
    store = Store(lab.settings)
    grid = [(c, b, p) for c in args.contexts.split(",") for b in args.budgets.split(",") for p in PRESSES]
    cells = [Cell(PEER + policy, float(budget), int(context)) for context, budget, policy in grid]
    for cell in track([cell for cell in cells if not store.done(cell)], "kvpress"):
        path = store.reference_path(cell.context)
        with torch.no_grad():
            reference = load_or_measure(path, lab.model, lab.plain_chunks(cell.context), lab.settings.steps)
        try:
            found = measure(lab, cell, reference, lambda doing: None)
        except Exception as error:  # of the other library: noted, and the rest goes on
            store.fail(cell, f"{type(error).__name__}: {error}")
            print(f"{cell.name} failed: {error}", flush=True)
            continue
        stamp = {"commit": f"kvpress {version('kvpress')}", "date": date.today().isoformat()}
        store.save(cell, {**found, **stamp})
        print(f"{cell.name}: {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
