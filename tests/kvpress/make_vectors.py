"""What NVIDIA's kvpress keeps of a prompt, written to vectors.json for test_vectors.py to compare with.

Runs in an environment of its own (README.md says how to make it): kvpress pins an older transformers than kvpass is
tested with. Every case is also computed in float64 and with weights that are off by 1e-6; a prompt for which that
changes what is kept is skipped and the next one taken, so that the vectors hold no ties and no near-ties.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
from transformers import DynamicCache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from model import HEADS, TOKENS, checksum, filters, llama, packed, prompt, surrogate  # noqa: E402

WINDOW = 16
"""Observation window of the presses that have one. kvpress' own default is 64."""

Kept = list[list[list[int]]]
"""Positions by layer and KV head."""


def snapkv(ratio: float) -> Any:
    return kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5)


def finch(ratio: float) -> Any:
    press = kvpress.FinchPress(ratio, rerotate_keys=False)
    press.delimiter_token_id = 96  # no prompt holds one: the window stays as it is said here
    press.window_size = WINDOW
    return press


def q_filter(ratio: float) -> Any:
    press = kvpress.QFilterPress(ratio)
    press.post_init_from_model = lambda model: setattr(press, "q_filters", filters().to(model.dtype))
    return press


def kvzap(ratio: float) -> Any:
    press = kvpress.KVzapPress(ratio)

    def load(model: Any) -> None:
        layers = [torch.nn.Linear(model.config.hidden_size, 2) for _ in range(2)]
        for linear, weight, bias in zip(layers, *surrogate(model.config.hidden_size), strict=True):
            linear.weight.data, linear.bias.data = weight, bias
        press.kvzap_model = SimpleNamespace(layers=layers)

    press.post_init_from_model = load
    return press


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[float], Any]
    runs: tuple[tuple[str, float], ...] = (("gqa", 0.5),)
    attention: str = "sdpa"
    first: int = 0  # the first prompt to try


GQA, MHA = (("gqa", 0.5),), (("mha", 0.8),)
CASES = [
    Case("streaming_llm", lambda r: kvpress.StreamingLLMPress(r, n_sink=4)),
    Case("knorm", kvpress.KnormPress),
    Case("keydiff", kvpress.KeyDiffPress),
    Case("q_filters", q_filter),
    Case("kvzap", kvzap),
    Case("expected_attention", kvpress.ExpectedAttentionPress, GQA + MHA),
    Case("cur", kvpress.CURPress),
    Case("tova", kvpress.TOVAPress, GQA + MHA),
    Case("observed_attention", kvpress.ObservedAttentionPress, GQA + MHA, attention="eager"),
    Case("snapkv", snapkv, GQA + MHA),
    Case("finch", finch),
    Case("pyramidkv", lambda r: kvpress.PyramidKVPress(r, window_size=WINDOW, kernel_size=5, beta=20)),
    Case("pyramidkv_beta2", lambda r: kvpress.PyramidKVPress(r, window_size=WINDOW, kernel_size=5, beta=2), MHA),
    Case("ada_snapkv", lambda r: kvpress.AdaKVPress(snapkv(r)), GQA + MHA, first=2),  # heads far from even
    Case("ada_knorm", lambda r: kvpress.AdaKVPress(kvpress.KnormPress(r), alpha_safeguard=0.97)),  # it binds
    Case("criticalkv", lambda r: kvpress.CriticalKVPress(snapkv(r)), GQA + MHA),
    Case("critical_ada", lambda r: kvpress.CriticalAdaKVPress(snapkv(r)), (("gqa", 0.8),), first=2),
    # Blocks of which whole ranks fit the budget: equal ranks of several blocks are in no one's order.
    Case("lagkv_32", lambda r: kvpress.LagKVPress(r, lag_size=32)),
    Case("lagkv_8", lambda r: kvpress.LagKVPress(r, lag_size=8), MHA),
    Case("lagkv_cross", lambda r: kvpress.LagKVPress(r, lag_size=32, cross_scoring=True)),
    Case("lagkv_short", kvpress.LagKVPress),  # fewer than two blocks of 128
    # A prompt whose prefix is whole chunks, and one where a chunk lies across the window's start.
    Case("chunkkv_8", lambda r: kvpress.ChunkKVPress(snapkv(r), chunk_length=8), GQA + MHA),
    Case("chunkkv_10", lambda r: kvpress.ChunkKVPress(snapkv(r), chunk_length=10)),
]


def kept(model: Any, press: Any, ids: torch.Tensor) -> Kept:
    """What the press leaves of the prompt: by the keys it hands back, or by the slots it says it masks."""
    found: Kept = []
    compress = press.compress

    def spy(module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        out = compress(module, hidden, keys, values, attentions, kwargs)
        masked = getattr(module, "masked_key_indices", None)
        found.append(unmasked(keys, masked) if masked is not None else matched(keys, out[0]))
        return out

    press.compress = spy
    with torch.no_grad(), press(model):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    return found


def unmasked(keys: torch.Tensor, masked: tuple[torch.Tensor, ...]) -> list[list[int]]:
    stays = torch.ones(keys.shape[:3], dtype=torch.bool)
    stays[masked] = False
    return [head.nonzero().flatten().tolist() for head in stays[0]]


def matched(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    """Positions of the keys that are still there: rotated keys of two positions are never equal."""
    same = (before[0][:, :, None] == after[0][:, None]).all(-1)
    assert (same.sum(1) == 1).all(), "a key that was handed back is not one of the prompt's"
    return [head.nonzero().flatten().tolist() for head in same.any(-1)]


def disturbed(model: Any, seed: int) -> Any:
    """Weights, and the embedding of each position (equal tokens have equal scores in the first layer), a little off."""
    generator = torch.Generator().manual_seed(seed)

    def off(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-6 * (2 * torch.rand(x.shape, generator=generator) - 1))

    for parameter in model.parameters():
        parameter.data = off(parameter.data)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: off(out))
    return model


def stable(case: Case, shape: str, ratio: float, seed: int) -> Kept | None:
    """What is kept of the prompt of that seed, or None where rounding decides."""

    def run(model: Any) -> Kept:
        return kept(model, case.make(ratio), prompt(seed))

    first = run(llama(shape, case.attention))
    others = [llama(shape, case.attention).double(), *(disturbed(llama(shape, case.attention), s) for s in range(3))]
    return first if all(run(model) == first for model in others) else None


def vector(case: Case, shape: str, ratio: float) -> dict[str, Any]:
    for seed in range(case.first, 50):
        found = stable(case, shape, ratio, seed)
        if found is not None:
            layers = [[packed(head) for head in layer] for layer in found]
            print(f"{case.name:20} {shape} {ratio} prompt {seed} kept {[[len(h) for h in x] for x in found]}")
            return {"name": case.name, "shape": shape, "ratio": ratio, "prompt": seed, "kept": layers}
    raise SystemExit(f"{case.name} {shape} {ratio}: rounding decides for every prompt")


def main() -> None:
    torch.set_num_threads(1)
    out = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "tokens": TOKENS,
        "window": WINDOW,
        "checksums": {shape: checksum(llama(shape)) for shape in HEADS},
    }
    vectors = [vector(case, *run) for case in CASES for run in case.runs]
    text = json.dumps(out, indent=1)[:-2] + ',\n "vectors": [\n'
    text += ",\n".join("  " + json.dumps(v) for v in vectors) + "\n ]\n}\n"
    (HERE / "vectors.json").write_text(text)


if __name__ == "__main__":
    main()
