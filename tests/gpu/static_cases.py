"""Steps as CUDA graphs: the same tokens and the same positions kept as kernel by kernel, and nothing waits.

Not collected by a plain `pytest`: the stage `policies` runs this file. Without a GPU there is nothing to record: the
same calls run as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.device import DEVICE, GPU, triton
from gpu.policy_cases import BUDGET, LENGTHS, POLICIES, SHAPE
from models import tiny
from policies import weights, with_weights
from spelling import cache_of

import kvpass
from kvpass.policy.policy import Policy
from kvpass.runtime.captured import Captured

NEW = 60 if GPU else 3


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From a step's first launch to its last, recorded or not."""
    real = Captured.__call__

    def step(self: Captured, *args: Any) -> Any:
        if GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *args)
        finally:
            if GPU:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Captured, "__call__", step)
    torch._dynamo.reset()
    with triton():
        yield


def generate(model: Any, policy: Policy, mode: str, inner: str = "eager", lengths: Any = None) -> Any:
    """Tokens, positions kept of each layer in rising order, counts of steps."""
    ids, mask = (x.to(DEVICE) for x in tiny.left_padded(lengths or LENGTHS))
    compiled = kvpass.compile(model, policy, inner=inner, mode=mode)
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "min_new_tokens": NEW}
    out = compiled.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings)
    cache = cache_of(out)
    kept = [layer.positions.sort(-1).values for layer in kvpass.inspect(cache).layers]
    return out.sequences, kept, kvpass.report(cache).to_dict()["steps"]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("name", POLICIES)
def test_recorded(name: str, tmp_path: Path) -> None:
    model = tiny.llama(**SHAPE)
    policy = with_weights(name, weights(tmp_path, model.config)).with_budget(
        None if Policy.load(name).keeps_all else BUDGET
    )
    model = model.to(DEVICE)
    launched, recorded = generate(model, policy, "default"), generate(model, policy, "reduce-overhead")
    assert same(launched, recorded)
    steps = recorded[2]
    assert steps["replays"] + steps["eager"] == NEW - 1
    assert not GPU or steps["replays"] > NEW // 2, steps


def test_under_inductor_twice_and_in_threads() -> None:
    model, policy = tiny.llama(**SHAPE).to(DEVICE), Policy.load("h2o").with_budget(BUDGET)
    wanted = generate(model, policy, "default")
    compiled = kvpass.compile(model, policy, mode="reduce-overhead")
    ids, mask = (x.to(DEVICE) for x in tiny.left_padded(LENGTHS))
    found: list[Any] = []

    def run() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            given = {"attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
            found.append(compiled.generate(ids, **given))
            torch.cuda.current_stream().synchronize()

    run()
    threads = [threading.Thread(target=run) for _ in range(2)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert len(found) == 3
    assert all(torch.equal(one, wanted[0]) for one in found)


if not GPU:
    del test_under_inductor_twice_and_in_threads  # a test that is skipped has shown nothing
