"""Slots held in two ways, both exact, are as if held in one. What a model in float16 caches, float16 codes hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.turns import two_turns
from oracle.drive import kept_positions

import kvpass

TWO = {"k": "float16", "v": "float16", "rotate": "none", "residual": 8, "sinks": 3}


@pytest.mark.usefixtures("one_trace", "in_torch")
@pytest.mark.parametrize("policy", ["h2o", "ada_snapkv", "roco"])
def test_whole_copies_beside_exact_codes(policy: str) -> None:
    model = tiny.llama(layers=2).half()
    found = []
    for store in ("dense", TWO):
        rule: dict[str, Any] = {"name": "mine", "extends": policy, "store": store}
        logits, cache = two_turns(kvpass.compile(model, rule, 48, inner="eager"), new=8)
        assert kvpass.report(cache).to_dict()["proof"]["evicted"] > 0
        found.append((logits.float(), kept_positions(cache)))
    (one, kept), (two, same) = found
    assert all(map(torch.equal, kept, same))
    torch.testing.assert_close(two, one, rtol=0, atol=2.0**-7)  # some float16 units of what layers add up
