"""A host may count and keep where it likes: few graphs, the model's own numbers, and its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.hosts import DIM, HEADS, HOSTS, LAYERS, ROOM, Host, ModuleCounter, Written

import kvpass

GRAPHS, BUDGET, SINKS = 4, 12, 4


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def converse(model: Any, prompt: int, steps: int) -> tuple[torch.Tensor, Host]:
    host, logits = Host(model), []
    with torch.no_grad():
        logits += [host.step(tokens(prompt if at == 0 else 1, seed=at))[:, -1] for at in range(steps + 1)]
    return torch.stack(logits), host


@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
def test_few_graphs_and_the_models_numbers(kind: Any) -> None:
    compiled = kvpass.compile(kind().eval(), "full", inner="eager")
    for prompt, steps in ((30, 40), (37, 5), (33, 5)):
        expected, _ = converse(kind().eval(), prompt, steps)
        found, _ = converse(compiled, prompt, steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= GRAPHS, compiled.kvpass.graphs
    assert all(len(record.table.sites) == LAYERS for record in compiled.kvpass.graphs)


@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
def test_keeps_what_the_policy_says(kind: Any) -> None:
    """Of `streaming_llm`: the first tokens and the last ones, as many as the budget."""
    compiled = kvpass.compile(kind().eval(), "streaming_llm", BUDGET, inner="eager")
    for prompt, steps in ((30, 6), (37, 3)):
        _, host = converse(compiled, prompt, steps)
        length = prompt + steps
        kept = [*range(SINKS), *range(length - BUDGET + SINKS, length)]
        for layer in kvpass.inspect(host.cache).layers:
            assert all(sorted(head.tolist()) == kept for row in layer.positions for head in row)
        data = kvpass.report(host.cache).to_dict()
        assert data["slot_bytes"] == LAYERS * 2 * HEADS * (BUDGET + 1) * DIM * 4
        assert data["caller_bytes"] == (LAYERS * 2 * HEADS * ROOM * DIM * 4 if kind is Written else 0)


def test_a_second_model_of_the_class_has_sizes_of_its_own() -> None:
    """Dynamo remembers sizes by line of code: what one model's module counts must not make symbols of another's."""
    kvpass.compile(ModuleCounter().eval(), "full", inner="eager")
    wide = ModuleCounter().eval()
    for model in (ModuleCounter().eval(), wide):
        if model is wide:
            wide.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 96, bias=False) for _ in range(LAYERS))
            wide.out = torch.nn.Linear(32, 70)
        compiled = kvpass.compile(model, "full", inner="eager")
        converse(compiled, 30, 3)
        for record in compiled.kvpass.graphs:
            assert all(site.dims["Hkv"] == HEADS and site.dims["D"] == DIM for site in record.table)


def test_torch_is_as_it_was_after_a_call() -> None:
    from torch._dynamo.variables import builder
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def seen() -> list[Any]:
        found = [vars(builder)[n] for n in ("is_int_specialization_case", "tensor_always_has_static_shape")]
        return [*found, TorchInGraphFunctionVariable.call_function]

    before = seen()
    converse(kvpass.compile(ModuleCounter().eval(), "full", inner="eager"), 30, 2)
    assert seen() == before
