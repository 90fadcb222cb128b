"""Where the oracle's bound for near-ties comes from: float32 against float64 of the same model on real text."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import smollm2
from oracle.hf import Oracle
from oracle.simulator import ROUNDING


@pytest.mark.model
@pytest.mark.parametrize("layers", [4, pytest.param(None, marks=pytest.mark.wide)], ids=["4 layers", "all layers"])
@pytest.mark.parametrize("policy", ["tova", "h2o"])  # one query's probabilities, and sums over all queries
def test_float32_moves_scores_by_less(policy: str, layers: int | None) -> None:
    model, tokenizer = smollm2.load(layers=layers)
    ids = tokenizer(smollm2.text(3000), return_tensors="pt").input_ids[:, :400]
    single, double = Oracle(model, policy, 0.2), Oracle(copy.deepcopy(model).double(), policy, 0.2)
    single(ids)
    double(ids)
    worst = 0.0
    for layer, exact in zip(single.simulator.layers.values(), double.simulator.layers.values(), strict=True):
        for a, b in zip(layer.heads[0], exact.heads[0], strict=True):
            worst = max(worst, float(np.max(np.abs(a.memory.sum - b.memory.sum) / b.memory.sum)))
    print(f"float32 moves the scores of {policy} by up to {worst:.2g}, the bound is {ROUNDING:.2g}")
    assert 2.0**-24 < worst < ROUNDING
