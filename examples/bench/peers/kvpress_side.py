"""NVIDIA's kvpress at work, for bench/benchmarks/decode.py: in an environment of its own (tests/kvpress/README.md).

`none` is Hugging Face's full cache there: what the environment and a process of its own make out. The presses compress
a prompt while it is read; the heads of AdaKV keep all entries and hide some. DecodingPress also drops entries each 128
steps. Positions go on behind the whole prompt, as in kvpress' own pipeline.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kvpress
import smollm2
import torch
from transformers import DynamicCache

from bench.contenders import divergence, prompt

WINDOW = 32
"""Queries that SnapKV observes: those of kvpass' preset."""


class Pressed:
    """A model with a press, and its cache."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, removed = job, 1 - job["budget"]
        self.model, tokenizer = smollm2.load(layers=job["layers"])
        self.model.to(job["device"])
        self.text = prompt(tokenizer, job["context"] + 4 + job["rounds"], job["batch"]).to(job["device"])
        snapkv, knorm = kvpress.SnapKVPress(removed, window_size=WINDOW), kvpress.KnormPress(removed)
        size = int(job["context"] * job["budget"])
        decoding = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=128, target_size=size)
        self.press, self.stepping = {
            "snapkv": (snapkv, None),
            "ada_snapkv": (kvpress.AdaKVPress(snapkv), None),
            "decoding_knorm": (knorm, decoding),
            "none": (contextlib.nullcontext, None),
        }[job["press"]]
        self.open = contextlib.ExitStack()

    def prefill(self) -> None:
        self.open.close()
        self.cache, self.at = DynamicCache(), self.job["context"]
        with self.press(self.model):
            self.model(self.text[:, : self.at], past_key_values=self.cache, logits_to_keep=1)
        if self.stepping is not None:
            self.open.enter_context(self.stepping(self.model))

    def step(self) -> None:
        place = torch.full((len(self.text), 1), self.at, device=self.text.device)
        token = self.text[:, self.at : self.at + 1]
        self.logits = self.model(token, past_key_values=self.cache, position_ids=place).logits[:, -1]
        self.logits.argmax(-1)
        self.at += 1

    def kl(self, path: str) -> float:
        return divergence(torch.load(path), self.logits)

    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


@torch.no_grad()
def main() -> None:
    one = Pressed(json.loads(sys.argv[1]))
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch"))
    print(json.dumps({"ready": versions}), flush=True)
    for line in sys.stdin:
        what, *given = line.split(maxsplit=1)
        said = getattr(one, what)(*(text.strip() for text in given))
        print(json.dumps({"said": said}), flush=True)


if __name__ == "__main__":
    main()
