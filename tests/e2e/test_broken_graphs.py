"""Graph breaks: each part does its share; a cache that is written in one and read in another is declined by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.hosts import DIM, HEADS, ROOM, WIDTH, Decoder
from torch import Tensor, nn

import kvpass
from kvpass.errors import DeclinedError, ShellDataError

BUDGET = 12


class Part(nn.Module):
    """An attention with buffers of its own; breaks the graph at a place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.project = place, nn.Linear(WIDTH, 3 * WIDTH)
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, HEADS, ROOM, DIM), persistent=False)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.place == "before" and places.max().item() >= ROOM:
            raise ValueError("too long")
        q, k, v = self.project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        self.k.index_copy_(2, places, k)
        self.v.index_copy_(2, places, v)
        if self.place == "between" and places.max().item() >= ROOM:
            raise ValueError("too long")
        return x + F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask).transpose(1, 2).reshape(b, t, -1)


class Breaking(Decoder):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.one, self.two = Part(place), Part(place)

    def forward(self, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.two(self.one(self.emb(ids), places, mask), places, mask))


class Leaves(Breaking):
    """Runs its steps uncompiled."""

    def forward(self, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        x = self.emb(ids)
        x = self.one(x, places, mask) if ids.shape[1] > 1 else self.alone(x, places, mask)
        return self.out(self.two(x, places, mask))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # torch does not say what it gives
    def alone(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.one(x, places, mask)
        return result


def converse(model: Any, prompt: int, steps: int) -> Tensor:
    tril, start, logits = torch.ones(ROOM, ROOM, dtype=torch.bool).tril(), 0, []
    with torch.no_grad():
        for at in range(steps + 1):
            length = prompt if at == 0 else 1
            ids = torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(at))
            logits.append(model(ids, torch.arange(start, start + length), tril[start : start + length])[:, -1])
            start += length
    return torch.stack(logits)


@pytest.mark.parametrize("place", ["nowhere", "before"])
def test_parts_do_their_share(place: str) -> None:
    compiled = kvpass.compile(Breaking(place).eval(), "full", inner="eager")
    for prompt, steps in ((30, 40), (37, 5)):
        expected = converse(Breaking(place).eval(), prompt, steps)
        torch.testing.assert_close(converse(compiled, prompt, steps), expected, rtol=1e-4, atol=1e-5)
    evicting = kvpass.compile(Breaking(place).eval(), "streaming_llm", BUDGET, inner="eager")
    converse(evicting, 30, 5)
    assert kvpass.report(evicting).to_dict()["slot_bytes"] == 2 * 2 * HEADS * (BUDGET + 1) * DIM * 4


class Renews(Part):
    """Writes into a copy of its buffers, that takes their place."""

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        self.k, self.v = self.k.index_copy(2, places, k), self.v.index_copy(2, places, v)
        if places.max().item() >= ROOM:
            raise ValueError("too long")
        return x + F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask).transpose(1, 2).reshape(b, t, -1)


class TurnedWhenRead(Part):
    """Keys and values in one buffer made in the call, keys changed as they are read: only values are read plainly."""

    def forward(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        self.both = torch.zeros(2, b, HEADS, ROOM, DIM)
        self.both.index_copy_(3, places, torch.stack([k, v]))
        if places.max().item() >= ROOM:
            raise ValueError("too long")
        k, v = self.both[0], self.both[1]
        k = torch.cat([-k[..., DIM // 2 :], k[..., : DIM // 2]], -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, -1)


@pytest.mark.parametrize(
    ("part", "line"),
    [(Renews, "self.k.index_copy(2, places, k)"), (TurnedWhenRead, "self.both.index_copy_(3, places")],
    ids=["a copy that takes the buffer's place", "values alone show it"],
)
def test_other_ways_to_write_are_declined_too(part: Any, line: str) -> None:
    model = Breaking("nowhere")
    model.one, model.two = part("between"), part("between")
    compiled = kvpass.compile(model.eval(), "h2o", BUDGET, inner="eager")
    with pytest.raises(DeclinedError, match="written into a buffer in one graph, and attended to in another") as raised:
        converse(compiled, 30, 0)
    assert line in raised.value.where


def test_between_write_and_attention_is_declined_at_the_first_call() -> None:
    compiled = kvpass.compile(Breaking("between").eval(), "h2o", BUDGET, inner="eager")
    with pytest.raises(DeclinedError, match="written into a buffer in one graph, and attended to in another") as raised:
        converse(compiled, 30, 0)
    where = raised.value.where
    assert "self.k.index_copy_(2, places, k)" in where
    assert "F.scaled_dot_product_attention(q, self.k, self.v" in where
    assert "Dynamo broke the graph at" in where
    assert "places.max().item()" in where
    assert ".item()" in raised.value.hint


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
def test_not_strict_it_stays_dense() -> None:
    compiled = kvpass.compile(Breaking("between").eval(), "h2o", BUDGET, inner="eager", strict=False)
    for prompt in (30, 37):
        assert torch.equal(converse(compiled, prompt, 5), converse(Breaking("between").eval(), prompt, 5))


@pytest.mark.parametrize("strict", [True, False])
def test_a_step_that_ran_uncompiled_beside_a_compressed_cache(strict: bool) -> None:
    """It reads zeros where the prompt's keys would lie, and no graph of ours sees it."""
    compiled = kvpass.compile(Leaves("nowhere").eval(), "full", inner="eager", strict=strict)
    converse(compiled, 30, 0)
    with pytest.raises(ShellDataError, match="ran uncompiled, and wrote into and read the buffer") as raised:
        converse(compiled, 30, 1)
    assert "begin again" in raised.value.hint


class Growing(Decoder):
    """A cache that grows in a part that is not compiled."""

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.emb(ids)
        b, t = ids.shape
        q, k, v = self.qkv[0](x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        torch._dynamo.graph_break()
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=t > 1).transpose(1, 2).reshape(b, t, WIDTH)
        return self.out(x), [k, v]


def test_a_cache_that_grew_names_the_break() -> None:
    compiled = kvpass.compile(Growing().eval(), "h2o", BUDGET, inner="eager")
    past = [torch.randn(1, HEADS, 5, DIM), torch.randn(1, HEADS, 5, DIM)]
    with torch.no_grad(), pytest.raises(DeclinedError) as raised:
        compiled(torch.arange(30)[None], past)
    assert "torch._dynamo.graph_break()" in str(raised.value), raised.value


def test_attention_over_another_sequence_is_no_break() -> None:
    """An encoder's states, written in one graph, are read in the next by queries of another length."""

    class Cross(Breaking):
        def forward(self, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
            x = self.emb(ids)
            k, v = self.qkv[0](x).view(1, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)[:2]
            self.one.k[:, :, : ids.shape[1]] = k
            self.one.v[:, :, : ids.shape[1]] = v
            torch._dynamo.graph_break()
            y = F.scaled_dot_product_attention(k[:, :, :3], self.one.k, self.one.v)
            return y.sum() + x

    compiled, original = kvpass.compile(Cross("").eval(), "h2o", BUDGET, inner="eager"), Cross("").eval()
    with torch.no_grad():
        given = torch.arange(30)[None], torch.arange(30), torch.ones(1)
        torch.testing.assert_close(compiled(*given), original(*given))
