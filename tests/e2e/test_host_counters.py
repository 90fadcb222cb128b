"""A host may count and keep where it likes: few graphs, the model's own numbers, and its budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.hosts import DIM, HEADS, HOSTS, LAYERS, ROOM, Host, ModuleCounter, Written, masked
from torch import Tensor, nn

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
@pytest.mark.some(5)
def test_few_graphs_and_the_models_numbers(kind: Any) -> None:
    compiled = kvpass.compile(kind().eval(), "full", inner="eager")
    for prompt, steps in ((30, 40), (37, 5), (33, 5)):
        expected, _ = converse(kind().eval(), prompt, steps)
        found, _ = converse(compiled, prompt, steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= GRAPHS, compiled.kvpass.graphs
    assert all(len(record.table.sites) == LAYERS for record in compiled.kvpass.graphs)


@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
@pytest.mark.some(5)
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


class Sized(nn.Module):
    """A counter on the module, beside a number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.position = heads, 0
        self.emb, self.qkv = nn.Embedding(50, heads * DIM), nn.Linear(heads * DIM, 3 * heads * DIM)
        self.register_buffer("table", torch.randn(64, heads * DIM))

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        b, t = ids.shape
        start, self.position = self.position, self.position + t
        x = self.emb(ids) + self.table[start : start + t]
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, DIM).permute(2, 0, 3, 1, 4)
        k, v = (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)) if past else (k, v)
        return masked(q, k, v), [k, v]


def test_a_second_model_of_the_class_has_sizes_of_its_own() -> None:
    """Dynamo remembers sizes by line of code: what one model has must not make symbols of another's."""
    for heads in (2, 3, 5):
        model = Sized(heads).eval()
        compiled, original = kvpass.compile(model, "full", inner="eager"), Sized(heads).eval()
        original.load_state_dict(model.state_dict())
        past, ours = list[Tensor](), list[Tensor]()
        for at in range(4):
            ids = tokens(30 if at == 0 else 1, at)
            with torch.no_grad():
                (found, past), (expected, ours) = compiled(ids, past), original(ids, ours)
            torch.testing.assert_close(found[:, :, -1], expected[:, :, -1], rtol=1e-4, atol=1e-5)
        assert len(compiled.kvpass.graphs) <= 3
        for record in compiled.kvpass.graphs:
            assert [(site.dims["Hkv"], site.dims["D"]) for site in record.table] == [(heads, DIM)]


def test_torch_is_as_it_was_after_a_call() -> None:
    from torch._dynamo.variables import builder
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def seen() -> list[Any]:
        found = [vars(builder)[n] for n in ("is_int_specialization_case", "tensor_always_has_static_shape")]
        return [*found, TorchInGraphFunctionVariable.call_function]

    before = seen()
    converse(kvpass.compile(ModuleCounter().eval(), "full", inner="eager"), 30, 2)
    assert seen() == before
