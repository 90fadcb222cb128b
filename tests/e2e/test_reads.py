"""A policy pays for what it reads: which passes over the keys a prefill and a step make, policy by policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.attention.observation import Observation, emitted
from kvpass.kernels.prefill_attend import reference
from models import tiny
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

LAYERS, TOKENS = 2, 150

EMITTED = {
    "streaming_llm": ((), 0),
    "knorm": ((), 0),
    "keydiff": ((), 0),
    "lagkv": ((), 0),
    "tova": (("sum",), 1),
    "snapkv": (("sum", "count"), 32),
    "ada_snapkv": (("sum", "count"), 32),
    "nacl": (("sum",), 32),
    "defensivekv": ((), 32),
    "scissorhands": (("count", "important"), 400),
    "h2o": (("sum",), -1),
    "roco": (("sum", "sumsq", "count"), -1),
}


@pytest.mark.parametrize("policy", EMITTED)
def test_what_the_op_is_told_to_emit(policy: str) -> None:
    rule = rule_of(Policy.load(policy).with_budget(0.2))
    assert (emitted(rule), rule[Observation].queries) == EMITTED[policy]


@pytest.mark.parametrize(
    ("policy", "rows", "window_ops", "arrivals"),
    [("knorm", 0, 0, 1), ("snapkv", 32, 0, 0), ("h2o", TOKENS, 0, 0), ("cake", 0, 1, 1)],
)
@pytest.mark.usefixtures("in_torch")
def test_what_is_computed(
    policy: str, rows: int, window_ops: int, arrivals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = reference.observe

    def observe(piece: Any, *args: Any) -> None:
        seen.append(int(args[5].any(0).sum()))  # watched query rows
        original(piece, *args)

    monkeypatch.setattr(reference, "observe", observe)
    model = tiny.llama(4, 2, layers=LAYERS)
    compiled = kvpass.compile(model, policy=policy, budget=48, inner="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        compiled(tiny.tokens(1, TOKENS), **with_cache(compiled, cache))
        compiled(tiny.tokens(1, 1), **with_cache(compiled, cache))
    assert seen == [rows] * LAYERS * (rows > 0)
    prefill, decode = (record.plan.sites[0].ops for record in compiled.kvpass.graphs)
    assert prefill.count("window_rows") == window_ops
    assert decode.count("arrivals") == arrivals
