"""What `explain` says about attention that no pattern took: who refused it, or how far each pattern got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.attention import hidden, layer, past
from torch import Tensor

import kvpass


def explained(weigh: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The only decline of a layer whose probabilities are `weigh(q, k)`."""

    def forward(self: Any, x: Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.finish(weigh(q, wide_k) @ wide_v), (k, v)

    (found,) = kvpass.explain(layer(forward), hidden(), past()).tables[0].declined
    return found


def probabilities_scaled(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) * q.mean(-1, keepdim=True)


def test_a_pattern_that_refused_is_named() -> None:
    found = explained(probabilities_scaled)
    assert (found.pattern, found.near) == ("softmax", ())
    assert "refused by pattern softmax" in str(found)


NEAR = {
    "sine": (lambda q, k: torch.softmax(torch.sin(q @ k.mT), -1), "product matmul ok, stopped at sin: sin of the"),
    "queries last": (lambda q, k: torch.softmax(q @ k.mT, -2), "over axis -2; the keys must be the last one"),
    "distances": (lambda q, k: torch.softmax(-(q[:, :, :, None] - k[:, :, None]).norm(dim=-1), -1), "no product of"),
    "no softmax": (lambda q, k: torch.sigmoid(q @ k.mT), "no call of softmax reads k_2"),
}


@pytest.mark.parametrize("name", NEAR)
def test_how_far_each_pattern_got(name: str) -> None:
    found = explained(NEAR[name][0])
    assert found.reason == "UNSUPPORTED_ATTENTION"
    assert [line.split(":")[0] for line in found.near] == ["sdpa", "sdpa_aten", "softmax"]
    assert found.near[0] == "sdpa: no call of sdpa reads k_2"
    assert NEAR[name][1] in found.near[2]
    assert f"near miss: {found.near[2]}" in str(found)
    assert found.to_dict()["near"] == list(found.near)


def test_update_patterns_are_named_too() -> None:
    def forward(self: Any, x: Tensor, cache: Any) -> Any:
        q, k, v = self.project(x)
        k, v = torch.cat([k, cache[0]], 2), torch.cat([v, cache[1]], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), (k, v)

    (found,) = kvpass.explain(layer(forward), hidden(), past()).tables[0].declined
    assert (found.reason, found.pattern) == ("NEW_FIRST", "cat")
