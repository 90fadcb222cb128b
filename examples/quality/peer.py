"""The same cells with NVIDIA's kvpress in kvpass' place, for policies that both have.

    /path/of/kvpress/bin/python -P examples/quality/peer.py [--budgets 0.2] [--contexts 1024] [--trials 4]

Runs in an environment of kvpress' own (tests/kvpress/README.md makes one; it also needs `pip install rich`,
`pip install --no-deps -e .` and the converted model of an earlier `make quality`). Finished cells lie beside kvpass',
as `kvpress snapkv` and so on, and `make quality ARGS=--render` shows them in the same tables. pairs.py runs it too.

kvpress compresses the first call of a cache and keeps every later token; its windows and pools are its own defaults.
What its head-wise presses drop is masked: `held` is what the cache's tensors hold.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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

MORE: dict[str, Callable[[float], Any]] = {
    "kvzip": kvpress.KVzipPress,
    "kvzip_plus": lambda ratio: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
    "ada_expected": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)),
}
"""What only pairs.py measures: two that read the prompt again, row by row, and what kvpress' README calls its best."""

DECODING: dict[str, Callable[..., Any]] = {
    "snapkv": lambda ratio=0.0: kvpress.SnapKVPress(ratio, window_size=16),
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "streaming_llm": kvpress.StreamingLLMPress,
}
INTERVAL = 32
"""Steps between two compressions; SnapKV's window has to be shorter."""


class Prefills:
    """The last plain prefill, run once. What a press does behind a layer changes no later layer, so its own hook
    can be called afterwards, on a copy of the cache.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.known = model, dict[Any, Any]()

    def __call__(self, press: Any, ids: torch.Tensor, given: dict[str, Any]) -> Any:
        key, own = tuple(ids.flatten().tolist()), given_cache(given)
        if key not in self.known:
            self.known = {key: self._run(ids, given, own)}
        out, cache, calls = self.known[key]
        own.layers = copy.deepcopy(cache.layers)
        with press(self.model):
            for module, kwargs in calls:
                module.masked_key_indices = None
                press.forward_hook(module, (), {**kwargs, "past_key_values": own}, (None, None))
        return out

    def _run(self, ids: torch.Tensor, given: dict[str, Any], cache: Any) -> tuple[Any, Any, list[Any]]:
        calls: list[Any] = []
        attentions = [layer.self_attn for layer in self.model.model.layers]
        hooks = [
            one.register_forward_hook(lambda m, _, k, out: calls.append((m, k)), with_kwargs=True) for one in attentions
        ]
        try:
            return self.model(ids, **given), copy.deepcopy(cache), calls
        finally:
            for hook in hooks:
                hook.remove()


class Pressed:
    """The model as the harness calls it: the first call of a cache is compressed, later ones say their positions,
    which the length of a compressed cache no longer does. With no press, whatever is around the calls compresses.

    Where layers slide over a window, the host makes its mask by their length, which is no longer the compressed
    layers': tokens of a later call then come one by one, and need none.
    """

    def __init__(self, model: Any, press: Any, prefills: Prefills | None = None) -> None:
        self.model, self.press, self.prefills = model, press or (lambda model: nullcontext()), prefills
        self.slides = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())

    def __call__(self, ids: torch.Tensor, **given: Any) -> Any:
        cache = given_cache(given)
        start = getattr(cache, "tokens", 0)
        if start == 0:
            cache.tokens = ids.shape[1]
            if self.prefills is not None:
                return self.prefills(self.press, ids, given)
            with self.press(self.model):
                return self.model(ids, **given)
        positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
        cache.tokens += ids.shape[1]
        ahead = ids.shape[1] - 1 if self.slides else 0
        for at in range(ahead):  # what only fills the cache needs no words' probabilities
            self.model.model(ids[:, at : at + 1], position_ids=positions[:, at : at + 1], past_key_values=cache)
        return self.model(ids[:, ahead:], position_ids=positions[:, ahead:], **given)


def for_full_layers(press: Any, model: Any) -> Any:
    """The press, kept off layers that slide over a window: kvpress does so for Gemma 3 with images, not without."""
    hook, rotary = press.forward_hook, model.model.rotary_emb
    press.forward_hook = lambda module, *rest: rest[-1] if getattr(module, "is_sliding", False) else hook(module, *rest)
    for name in ("inv_freq", "attention_scaling"):  # ExpectedAttentionPress does not say which layers' rotation it asks
        if hasattr(rotary, f"full_attention_{name}"):
            setattr(rotary, f"None_{name}", getattr(rotary, f"full_attention_{name}"))
    return press


class PeerLab(Lab):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.prefills = Prefills(self.model)

    def compiled(self, cell: Cell) -> Any:
        make = {**PRESSES, **MORE}[cell.policy.removeprefix(PEER)]
        press = for_full_layers(make(1 - cell.budget), self.model)
        return Pressed(self.model, press, None if isinstance(press, kvpress.KVzipPress) else self.prefills)

    @contextmanager
    def decoding(self, cell: Cell, slots: int, prompt: int) -> Iterator[Any]:
        """Between two compressions the cache grows by INTERVAL tokens: it holds `slots` in the middle of that."""
        make, target = DECODING[cell.policy.removeprefix(PEER)], slots - INTERVAL // 2
        steps = kvpress.DecodingPress(make(), compression_interval=INTERVAL, target_size=target)
        share = 1 - (slots + 0.5) / prompt
        press = for_full_layers(kvpress.PrefillDecodingPress(make(share), steps), self.model)
        with press(self.model):
            yield Pressed(self.model, None)

    def capture_seconds(self, model: Any) -> float:
        return 0.0

    def held(self, cache: Any) -> dict[str, Any]:
        layers = [layer for layer in cache.layers if not layer.is_sliding]
        tensors = [t for layer in layers for t in (layer.keys, layer.values)]
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
