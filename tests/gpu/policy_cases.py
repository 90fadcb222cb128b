"""generate under each built-in policy, on the device and on the CPU: the same tokens, and the same positions kept.

Not collected by a plain `pytest`: the stage `policies` runs this file.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.device import DEVICE, GPU, triton
from models import tiny
from policies import weights, with_weights
from spelling import cache_of
from torch import Tensor

import kvpass
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

POLICIES = names() if GPU else ["h2o"]
"""On a CPU Triton is forced upon every op, so only rules that it supports could run."""
LENGTHS = [120, 77] if GPU else [12, 7]
NEW, BUDGET = (16, 0.3) if GPU else (3, 8)
SHAPE = {"layers": 3} if GPU else {"layers": 1, "heads": 2, "kv_heads": 1}


def generate(model: Any, policy: Policy) -> tuple[Tensor, list[Tensor]]:
    """Tokens [B, n], and the positions of every layer [B, Hkv, C] in rising order, -1 where a slot is empty."""
    ids, mask = (x.to(model.device) for x in tiny.left_padded(LENGTHS))
    compiled = kvpass.compile(model, policy=policy, inner="eager")
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "min_new_tokens": NEW}
    out = compiled.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings)
    layers = kvpass.inspect(cache_of(out)).layers
    return out.sequences.cpu(), [layer.positions.sort(-1).values.cpu() for layer in layers]


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name: str, tmp_path: Path) -> None:
    model = tiny.llama(**SHAPE)
    budget = None if Policy.load(name).keeps_all else BUDGET
    policy = with_weights(name, weights(tmp_path, model.config)).with_budget(budget)
    tokens, kept = generate(model, policy)
    torch._dynamo.reset()
    with triton():
        their_tokens, their_kept = generate(copy.deepcopy(model).to(DEVICE), policy)
    assert torch.equal(tokens, their_tokens)
    assert len(kept) == len(their_kept) == SHAPE["layers"]
    for layer, (here, there) in enumerate(zip(kept, their_kept, strict=True)):
        assert torch.equal(here, there), f"layer {layer} keeps other positions"
