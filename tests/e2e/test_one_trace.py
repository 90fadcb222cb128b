"""What tests share (models/traced.py) is Dynamo's trace only: each compilation has graphs, caches and choices of its
own, the same as without sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import nest, plain, traced
from torch._dynamo.utils import counters

import kvpass

IDS, POLICIES = plain.tokens(1, 60), ("h2o", "tova", "streaming_llm")


def positions(model: Any, policy: str) -> tuple[list[torch.Tensor], int]:
    """What a conversation keeps, and how many graphs kvpass was given."""
    compiled = kvpass.compile(model, policy, 24, inner="eager")
    cache = nest.run(compiled, IDS, 4)
    return [layer.positions for layer in kvpass.inspect(cache).layers], len(compiled.kvpass.graphs)


def test_traces_are_shared_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain.make(plain.Decoder)
    alone = [positions(model, policy) for policy in POLICIES]
    monkeypatch.setattr("kvpass.model.compilation.isolated", traced.isolated)
    first = positions(model, POLICIES[0])
    counters.clear()
    shared = [first, *(positions(model, policy) for policy in POLICIES[1:])]
    assert not counters["stats"], "Dynamo traced again"
    for (ours, graphs), (theirs, wanted) in zip(shared, alone, strict=True):
        assert graphs == wanted
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(shared[0][0][1], shared[1][0][1])


def test_a_backend_that_asks_for_a_guard_may_not_share() -> None:
    """Dynamo would compile anew for another length; a shared trace could not."""

    def specialises(gm: Any, inputs: Any) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            if isinstance(value, torch.Tensor):
                assert all(int(size) > 0 for size in value.shape)
        return gm.forward

    call = traced.isolated(specialises)
    module = torch.nn.Linear(4, 4)
    torch._dynamo.mark_dynamic(x := torch.ones(9, 4), 0)
    with pytest.raises(AssertionError, match="Dynamo would have guarded"):
        call(torch.nn.Module._call_impl, module, x)
