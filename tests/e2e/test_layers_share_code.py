"""Layers that are alike are compiled once, whatever evicts, and give what the graph run node by node gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny

import kvpass
from kvpass.pipeline import inner as inner_compilers

LAYERS = 4
PADDING = 9


def logits(compiled: Any, steps: int) -> list[torch.Tensor]:
    """Of a prompt of two rows, the first left padded, and of greedy steps after it."""
    ids = tiny.tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    out = compiled.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(out.logits)


@pytest.fixture
def compiled_nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the graphs that reach the inner compiler."""
    sizes: list[int] = []
    whole = inner_compilers._whole

    def noting(name: str, gm: Any, inputs: list[Any]) -> Any:
        sizes.append(len(gm.graph.nodes))
        return whole(name, gm, inputs)

    monkeypatch.setattr(inner_compilers, "_whole", noting)
    return sizes


@pytest.mark.parametrize(
    ("policy", "inner", "graphs"),
    [
        ("h2o", "inductor", 3),  # before the layers, a layer, after them; and the same for the step
        pytest.param("snapkv", "aot_eager", 3, marks=pytest.mark.wide),  # this and full: alike in h2o's way
        pytest.param(
            "pyramidkv", "aot_eager", LAYERS, marks=pytest.mark.wide
        ),  # at least: each layer has slots of its own
        pytest.param("full", "aot_eager", 3, marks=pytest.mark.wide),
    ],
)
def test_values_are_those_of_the_graph(policy: str, inner: str, graphs: int, compiled_nodes: list[int]) -> None:
    model = tiny.llama(4, 2, layers=LAYERS)
    budget = None if policy == "full" else 0.4
    ours = logits(kvpass.compile(model, policy, budget, inner=inner), 5)
    if policy == "pyramidkv":
        assert len(compiled_nodes) == 2 or len(compiled_nodes) >= 2 * graphs
    else:
        assert len(compiled_nodes) == 2 * graphs
    theirs = logits(kvpass.compile(model, policy, budget, inner="eager"), 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layers_share_nothing_where_a_gradient_may_be_asked_for(compiled_nodes: list[int]) -> None:
    """With grad enabled the graph goes whole to the inner compiler, which makes a backward graph too."""
    model = tiny.llama(4, 2, layers=LAYERS).requires_grad_(False)
    kvpass.compile(model, "h2o", 0.4, inner="aot_eager")(tiny.tokens(1, 20))
    assert len(compiled_nodes) == 1
