"""Habits of public decoders that are no cache of another kind: keys changed in place before they are cached, caches
that are detached or copied, the mask again behind the softmax (ESPnet).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.attention import DIM, attend, hidden, layer
from torch import Tensor

import kvpass

BUDGET = 6
Change = Callable[[Tensor], Any]


def partly(k: Tensor) -> None:
    k[..., : DIM // 2] = k[..., : DIM // 2].cos()


def divided(k: Tensor) -> None:
    k /= k.norm(dim=-1, keepdim=True)


IN_PLACE: dict[str, Change] = {
    "clamp": lambda k: k.clamp_(-0.5, 0.5),
    "mul": lambda k: k.mul_(0.5),
    "partly": partly,
    "divided": divided,
}
STORED: dict[str, Change] = {
    "detach": lambda k: k.detach(),
    "data": lambda k: k.data,
    "clone": lambda k: k.clone(),
    "contiguous": lambda k: k.contiguous(),
}


def grown(past: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))


def causal(s: int, t: int) -> Tensor:
    return torch.ones(s, t, dtype=torch.bool).tril(t - s)


def changing(change: Change) -> Any:
    def forward(self, x, past=None):
        q, k, v = self.project(x)
        change(k)
        k, v = grown(past, k, v)
        return self.finish(attend(q, k, v, attn_mask=causal(q.shape[2], k.shape[2]))), (k, v)

    return forward


def storing(store: Change) -> Any:
    def forward(self, x, past=None):
        q, k, v = self.project(x)
        k, v = grown(past, k, v)
        y = self.finish(attend(q, k, v, attn_mask=causal(q.shape[2], k.shape[2])))
        return y, (store(k), store(v))

    return forward


def hiding_twice(self, x, past=None):
    """Probabilities of what is hidden are set to zero again, which matters in rows that see nothing."""
    q, k, v = self.project(x)
    k, v = grown(past, k, v)
    spread_k, spread_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    hidden = ~causal(q.shape[2], k.shape[2])
    logits = (q @ spread_k.mT / DIM**0.5).masked_fill(hidden, float("-inf"))
    return self.finish(logits.softmax(-1).masked_fill(hidden, 0.0) @ spread_v), (k, v)


HABITS = {
    **{f"{name} before": changing(change) for name, change in IN_PLACE.items()},
    **{f"{name} stored": storing(store) for name, store in STORED.items()},
    "hidden twice": hiding_twice,
}


def converse(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    cache, out = None, []
    with torch.no_grad():
        for x in inputs:
            y, cache = model(x, cache)
            out.append(y)
    return out


@pytest.mark.parametrize("name", HABITS)
def test_a_full_budget_is_the_model_and_a_small_one_evicts(name: str) -> None:
    torch.manual_seed(7)
    inputs = [hidden(length) for length in (9, 1, 1, 1, 1)]
    compiled = kvpass.compile(layer(HABITS[name]), "full", inner="eager")
    for got, expected in zip(converse(compiled, inputs), converse(layer(HABITS[name]), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= 3
    evicting = kvpass.compile(layer(HABITS[name]), "streaming_llm", BUDGET, inner="eager")
    _, cache = _run(evicting, inputs)
    (held,) = kvpass.inspect(cache).layers
    assert all(len(row) == BUDGET for rows in held.positions for row in rows)


def _run(model: Any, inputs: list[Tensor]) -> tuple[Tensor, Any]:
    cache = None
    with torch.no_grad():
        for x in inputs:
            y, cache = model(x, cache)
    return y, cache
