"""Habits of public decoders that are no cache of another kind: keys changed in place before they are cached, caches
that are detached or copied, the mask again behind the softmax (ESPnet).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.attention import DIM, KV_HEADS, WIDTH, attend, hidden, layer
from torch import Tensor, nn

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


def heads_apart_in_the_cache(self, x, past=None):
    """fairseq: attention over sequences and heads in one axis, a cache of four axes."""
    b, t, _ = x.shape
    q, k, v = (p(x).view(b, t, KV_HEADS, DIM).transpose(1, 2).reshape(b * KV_HEADS, t, DIM) for p in self.narrow)
    if past is not None:
        k, v = (torch.cat([old.view(b * KV_HEADS, -1, DIM), new], 1) for old, new in zip(past, (k, v), strict=True))
    kept = tuple(y.view(b, KV_HEADS, -1, DIM) for y in (k, v))
    logits = torch.bmm(q, k.transpose(1, 2)) * DIM**-0.5
    logits = logits.masked_fill(~causal(t, k.shape[1]), float("-inf"))
    y = torch.bmm(logits.softmax(-1), v).view(b, KV_HEADS, t, DIM).transpose(1, 2).flatten(2)
    return y, kept


HABITS = {
    "heads apart": heads_apart_in_the_cache,
    **{f"{name} before": changing(change) for name, change in IN_PLACE.items()},
    **{f"{name} stored": storing(store) for name, store in STORED.items()},
    "hidden twice": hiding_twice,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(11)
    return layer(HABITS[name], narrow=nn.ModuleList(nn.Linear(WIDTH, KV_HEADS * DIM) for _ in range(3)))


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
    compiled = kvpass.compile(made(name), "full", inner="eager")
    for got, expected in zip(converse(compiled, inputs), converse(made(name), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert len(compiled.kvpass.graphs) <= 3
    evicting = kvpass.compile(made(name), "streaming_llm", BUDGET, inner="eager")
    _, cache = _run(evicting, inputs)
    (held,) = kvpass.inspect(cache).layers
    assert all(len(row) == BUDGET for rows in held.positions for row in rows)


def _run(model: Any, inputs: list[Tensor]) -> tuple[Tensor, Any]:
    cache = None
    with torch.no_grad():
        for x in inputs:
            y, cache = model(x, cache)
    return y, cache


class Stacked(nn.Module):
    """nanochat: all layers' keys and values in one tensor that the host holds, indexed at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor, stack: Tensor, at: int) -> Tensor:
        b, t, _ = x.shape
        for i, project in enumerate(self.project):
            q, k, v = project(x).view(b, t, 3, -1, DIM).permute(2, 0, 3, 1, 4)
            stack[i, 0, :, :, at : at + t] = k
            stack[i, 1, :, :, at : at + t] = v
            k, v = stack[i, 0, :, :, : at + t], stack[i, 1, :, :, : at + t]
            x = x + attend(q, k, v, attn_mask=causal(t, at + t)).transpose(1, 2).flatten(2)
        return x


def test_a_stack_of_all_layers_is_indexed_at_once() -> None:
    compiled = kvpass.compile(Stacked().eval(), "full", inner="eager")
    for prompt in (9, 12):
        stacks, at = [torch.zeros(2, 2, 2, WIDTH // DIM, 24, DIM) for _ in range(2)], 0
        for count in (prompt, 1, 1, 1):
            x = hidden(count)
            with torch.no_grad():
                got, expected = compiled(x, stacks[0], at), Stacked().eval()(x, stacks[1], at)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            at += count
    assert len(compiled.kvpass.graphs) <= 4


class Snapshots(nn.Module):
    """Returns copies of a buffer's front, which the caller keeps while later calls write on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2, 8, 4), persistent=False)

    def forward(self, x: Tensor, at: int) -> tuple[Tensor, Tensor]:
        self.seen[:, at : at + x.shape[1]] = x
        return x * 2, self.seen[:, :4].clone()


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
def test_a_copy_of_what_is_written_to_stays_a_copy() -> None:
    compiled, model = kvpass.compile(Snapshots().eval(), "h2o", BUDGET, inner="eager", strict=False), Snapshots()
    kept: list[list[Tensor]] = [[], []]
    for at in (0, 2, 1):
        for made, call in zip(kept, (compiled, model), strict=True):
            with torch.no_grad():
                made.append(call(torch.full((2, 2, 4), 1.0 + at), at)[1])
    for got, expected in zip(*kept, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
