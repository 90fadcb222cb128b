"""Contenders that other projects made, each in an environment of its own: what they are, and how they are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.side import Side
from bench.suite import Job, Options

HERE = Path(__file__).resolve().parent
PRESSES = ("none", "snapkv", "ada_snapkv", "decoding_knorm")
"""`none` is a control: the full cache in that environment, in a process of its own."""


def peers(options: Options) -> list[dict[str, Any]]:
    """Those whose environments a run was given. Each is `name`, `script`, `python` and what the script reads."""
    found = []
    if options.kvpress:
        for press in PRESSES[:2] if options.quick else PRESSES:
            name = "HF dynamic, kvpress' environment" if press == "none" else f"kvpress {press} 20 %"
            one = {"name": name, "script": "kvpress_side.py", "python": options.kvpress}
            found.append({**one, "press": press, "budget": 0.2})
    if options.llama:
        found.append({"name": "llama.cpp, Q4_1", "script": "llama_side.py", "python": options.llama, "most_rows": 1})
    return [one for one in found if options.only in one["name"]]


class Peer(Side):
    """A contender in its own process: takes steps over the same text, token by token."""

    def __init__(self, one: dict[str, Any], job: Job) -> None:
        given = {key: job[key] for key in ("context", "batch", "layers", "rounds", "device")}
        script = str(HERE / one["script"])
        super().__init__([one["python"], "-P", script, json.dumps({**given, **one})])
        self.name, self.about = str(one["name"]), str(self.ready)

    def step(self, token: torch.Tensor) -> None:
        self.ask("step")
