"""Threads that call one compiled model, first calls included: each gets what it would have got alone."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import plain, tiny
from models.turns import GREEDY
from spelling import cache_of, with_cache
from torch import Tensor

import kvpass
from kvpass.model import dynamo

BUDGET = 40
LENGTHS = (70, 55, 90, 61)


def conversation(model: Any, length: int, start: threading.Barrier | None = None) -> tuple[Tensor, Any]:
    """Two turns; the threads begin together."""
    ids = tiny.tokens(1, length, seed=length)
    if start is not None:
        start.wait()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **GREEDY)
    more = torch.cat([out.sequences, tiny.tokens(1, 5, seed=length + 1)], 1)
    given = {"attention_mask": torch.ones_like(more), "max_new_tokens": 8, **GREEDY, **with_cache(model, cache_of(out))}
    out = model.generate(more, **given)
    return out.sequences, [layer.positions for layer in kvpass.inspect(cache_of(out)).layers]


@pytest.mark.parametrize(("policy", "threads"), [("h2o", 2), ("ada_snapkv", 4)])
def test_conversations_at_once(policy: str, threads: int) -> None:
    model = tiny.llama(layers=1)
    compiled = kvpass.compile(model, policy, BUDGET if policy == "h2o" else 48, inner="eager")
    start = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(conversation, compiled, length, start) for length in LENGTHS[:threads]]
        found = [one.result(timeout=240) for one in running]
    for length, (sequences, positions) in zip(LENGTHS, found, strict=False):
        alone = conversation(compiled, length)
        assert torch.equal(sequences, alone[0])
        assert all(torch.equal(a, b) for a, b in zip(positions, alone[1], strict=True))
    assert torch._dynamo.config.recompile_limit != dynamo.LIMIT, "the caller's settings are back"


def said_alone(model: Any, seed: int) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(ids)[:, -1] for ids in (plain.tokens(1, 60, seed), *steps(seed))])


def steps(seed: int) -> list[Tensor]:
    return [plain.tokens(1, 1, seed=100 * seed + at) for at in range(6)]


def test_compilations_of_one_model_that_keeps_its_cache() -> None:
    """The model's attributes are one place; each compiled model puts its own cache there for the time of a call."""
    model = plain.make(plain.AttributeDecoder)
    policies = ("h2o", "full")
    made = [kvpass.compile(model, policy, None if policy == "full" else BUDGET, inner="eager") for policy in policies]
    alone = [
        said_alone(kvpass.compile(plain.make(plain.AttributeDecoder), policy, None if policy == "full" else BUDGET,
                                  inner="eager"), seed)
        for seed, policy in enumerate(policies)
    ]  # fmt: skip
    start = threading.Barrier(len(made))

    def talk(at: int) -> Tensor:
        start.wait()
        return said_alone(made[at], at)

    with ThreadPoolExecutor(len(made)) as pool:
        found = [*pool.map(talk, range(len(made)), timeout=240)]
    for got, want in zip(found, alone, strict=True):
        assert torch.equal(got, want)
    assert all(block.ck is None for block in model.blocks), "the model itself has said nothing"


def test_models_that_share_modules_take_turns() -> None:
    first, second = (torch.nn.Linear(2, 2).eval() for _ in range(2))
    one, two = (kvpass.compile(part, "full", inner="eager") for part in (first, second))
    both = kvpass.compile(torch.nn.Sequential(first, second).eval(), "full", inner="eager")
    again = kvpass.compile(first, "h2o", BUDGET, inner="eager")
    locks = [set(map(id, c._kvpass_compilation.turns.locks)) for c in (one, two, both, again)]
    assert locks[0] == locks[3]
    assert not locks[0] & locks[1], "others do not wait for each other"
    assert locks[2] == locks[0] | locks[1]


class Shared:
    """Settings of a torch in which they are the process's."""

    recompile_limit = 8


@pytest.mark.parametrize("own", [False, True])
def test_settings_come_back_when_the_last_call_ends(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that begins within another thread's ends after it."""
    config: Any = torch._dynamo.config if own and dynamo._are_of_threads(torch._dynamo.config) else Shared()
    settings, before = dynamo._Settings(), config.recompile_limit
    monkeypatch.setattr(dynamo, "_WITHIN_A_CALL", {"recompile_limit": 64})
    one, two = (settings.put(config) for _ in range(2))
    there = contextvars.Context()
    one.__enter__()
    there.run(two.__enter__)
    one.__exit__(None, None, None)
    assert there.run(getattr, config, "recompile_limit") == 64
    there.run(two.__exit__, None, None, None)
    assert there.run(getattr, config, "recompile_limit") == before
    assert config.recompile_limit == before
