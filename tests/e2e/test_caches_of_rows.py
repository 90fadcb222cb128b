"""Caches whose sequences and heads share one axis, [B * H, D, T] and [B * H, T, D], as BLOOM has them, with masks and
biases in front of the logits' view as [B, H, S, T] and behind it. The second sequence is padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass

HEADS, DIM, WIDTH, BATCH, PAD, BUDGET, SINKS, LAYERS = 2, 8, 16, 2, 5, 10, 4, 2
CALLS = (14, 1, 1, 4, 1, 1)
LOW = torch.finfo(torch.float32).min
Logits = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries [N, S, D], keys [N, D, T], alibi [N, 1, T] and hidden keys [B, 1, S, T], as [B, H, S, T]."""


def biased_before(q: Tensor, k: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    """BLOOM."""
    logits = alibi.baddbmm(q, k, beta=1.0, alpha=DIM**-0.5)
    return logits.view(len(hidden), HEADS, *logits.shape[1:]).masked_fill(hidden, LOW)


def biased_behind(q: Tensor, k: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    """Falcon's order: one bias for each head of each sequence."""
    logits = torch.bmm(q, k).view(len(hidden), HEADS, q.shape[1], k.shape[2]) * DIM**-0.5
    return (logits + alibi.view(len(hidden), HEADS, 1, -1)).masked_fill(hidden, LOW)


def of_each_head(q: Tensor, k: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    """One bias for each head, of all sequences."""
    bias = alibi.new_tensor([0.25, 0.0625])[:, None, None] * torch.arange(k.shape[2])
    logits = torch.bmm(q, k).view(len(hidden), HEADS, q.shape[1], k.shape[2]) * DIM**-0.5 + bias
    return logits.masked_fill(hidden, LOW)


def unbiased(q: Tensor, k: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    """All of the mask is proved: tokens of sequences, for rows of the cache."""
    logits = torch.bmm(q, k).view(len(hidden), HEADS, q.shape[1], k.shape[2]) * DIM**-0.5
    return logits.masked_fill(hidden, LOW)


def grouped(q: Tensor, k: Tensor, alibi: Tensor, hidden: Tensor) -> Tensor:
    """An axis of groups, which here has the heads."""
    logits = torch.bmm(q, k).view(len(hidden), 1, HEADS, q.shape[1], k.shape[2]) * DIM**-0.5
    return (logits + alibi.view(len(hidden), 1, HEADS, 1, -1)).masked_fill(hidden[:, None], LOW)


KINDS = (biased_before, biased_behind, of_each_head, unbiased, grouped)


class Decoder(nn.Module):
    def __init__(self, logits: Logits) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.logits, self.emb, self.out = logits, nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        for linear in self.qkv:
            nn.init.normal_(linear.weight, std=0.4)
        self.eval()

    def forward(self, ids: Tensor, real: Tensor, past: Any = None, gone: Tensor | None = None) -> tuple[Tensor, Any]:
        """`real`: int [B, T]; `gone`: bool [B, T], what an evicting cache has forgotten."""
        (b, s), x, new = ids.shape, self.emb(ids), []
        start = real.shape[1] - s
        places = (real.cumsum(-1) - 1) * real
        alibi = (real.new_tensor([0.25, 0.0625], dtype=x.dtype)[:, None] * places[:, None]).reshape(b * HEADS, 1, -1)
        ahead = torch.arange(start + s) > torch.arange(start, start + s)[:, None]
        hidden = (real[:, None, None, :] == 0) | ahead
        if gone is not None:
            hidden = hidden | gone[:, None, None]
        for at, linear in enumerate(self.qkv):
            q, k, v = linear(x).view(b, s, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).reshape(3, b * HEADS, s, DIM)
            k = k.transpose(1, 2)
            if past is not None:
                k, v = torch.cat((past[at][0], k), 2), torch.cat((past[at][1], v), 1)
            new.append((k, v))
            weights = self.logits(q, k, alibi, hidden).softmax(-1).reshape(b * HEADS, s, -1)
            y = torch.bmm(weights, v).view(b, HEADS, s, DIM)
            x = x + y.transpose(1, 2).flatten(2)
        return self.out(x), tuple(new)


def calls() -> list[tuple[Tensor, Tensor]]:
    """Tokens of each call, and which of all so far are real."""
    real, found = torch.ones(BATCH, sum(CALLS), dtype=torch.long), []
    real[1, :PAD] = 0
    ids = torch.randint(0, 50, real.shape, generator=torch.Generator().manual_seed(4))
    for at, count in enumerate(CALLS):
        end = sum(CALLS[: at + 1])
        found.append((ids[:, end - count : end].contiguous(), real[:, :end].contiguous()))
    return found


def talked(model: Any, gone: list[Tensor] | None = None) -> list[Tensor]:
    """Logits of each call, of real tokens."""
    past, found = None, []
    with torch.no_grad():
        for at, (ids, real) in enumerate(calls()):
            logits, past = model(ids, real, past) if gone is None else model(ids, real, past, gone[at])
            found.append(logits[real[:, -ids.shape[1] :].bool()])
    return found


def forgotten(budget: int) -> list[Tensor]:
    """What streaming_llm has evicted before each call: all but each sequence's first tokens and the newest."""
    found, past = [], 0
    for _, real in calls():
        gone = torch.zeros(real.shape, dtype=torch.bool)
        first = real.argmax(-1)
        for row, start in zip(gone, first.tolist(), strict=True):
            row[start + SINKS : max(start + SINKS, past - (budget - SINKS))] = True
        found.append(gone)
        past = real.shape[1]
    return found


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(3)
def test_full_budget_is_the_model(kind: Logits) -> None:
    compiled = kvpass.compile(Decoder(kind), "full", inner="eager", verify=True)
    torch.testing.assert_close(talked(compiled), talked(Decoder(kind)), rtol=1e-4, atol=1e-5)
    assert [len(record.table.sites) for record in compiled.kvpass.graphs] == [LAYERS] * len(compiled.kvpass.graphs)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(3)
def test_evicting_is_the_model_that_sees_no_more(kind: Logits) -> None:
    gone, plain = forgotten(BUDGET), talked(Decoder(kind))
    expected = talked(Decoder(kind), gone)
    found = talked(kvpass.compile(Decoder(kind), "streaming_llm", BUDGET, inner="eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[-1], expected[-1], atol=1e-2)


@pytest.mark.usefixtures("one_trace")
def test_what_is_proved_of_sequences() -> None:
    """Masks of sequences become tokens of the cache's rows; a bias for each head stays a tensor."""
    for kind, sees in ((unbiased, "causal tokens"), (biased_behind, "causal tokens, and adds a tensor by key")):
        compiled = kvpass.compile(Decoder(kind), "streaming_llm", BUDGET, inner="eager")
        talked(compiled)
        assert {str(site.seen) for site in compiled.kvpass.graphs[0].table.sites} == {sees}
