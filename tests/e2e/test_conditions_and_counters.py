"""Conditions on sizes, state of the host that changes at every call, indices written twice: few graphs, all exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

HEADS, DIM, WIDTH, ROOM = 2, 8, 16, 64
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb, self.qkv = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def project(self, ids: Tensor) -> Any:
        b, t = ids.shape
        return self.qkv(self.emb(ids)).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)


class ByCondition(Base):
    """A tuple that grows; `is_causal` is said by a condition on sizes."""

    def __init__(self, causal: Callable[[Tensor, Tensor, Any], Any]) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, ids: Tensor, past: Any = None) -> Any:
        q, k, v = self.project(ids)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal(q, k, past)), (k, v)


CONDITIONS = {
    "several queries": lambda q, k, past: q.shape[2] > 1,
    "as many keys": lambda q, k, past: q.shape[2] == k.shape[2] and k.size(2) > 1,
    "no past": lambda q, k, past: q.shape[2] > 1 and past is None,
    "not one": lambda q, k, past: q.size(-2) != 1,
}


def in_turns(model: Any, prompts: list[int], steps: int) -> list[Tensor]:
    """Outputs of several conversations through a cache that is passed along."""
    found = []
    with torch.no_grad():
        for at, n in enumerate(prompts):
            out, cache = model((torch.arange(n) + at)[None] % 50)
            found.append(out)
            for step in range(steps):
                out, cache = model(torch.tensor([[step]]), cache)
                found.append(out)
    return found


@pytest.mark.parametrize("name", CONDITIONS)
def test_is_causal_by_a_condition(name: str) -> None:
    model, plain = (ByCondition(CONDITIONS[name]).eval() for _ in range(2))
    compiled = kvpass.compile(model, "h2o", 1.0, inner="eager")
    torch.testing.assert_close(in_turns(compiled, [20, 27, 31], 3), in_turns(plain, [20, 27, 31], 3), **FLOAT32)
    assert len(compiled.kvpass.graphs) <= 4
    assert all(len(record.table.sites) == 1 for record in compiled.kvpass.graphs)
    small = kvpass.compile(ByCondition(CONDITIONS[name]).eval(), "h2o", 10, inner="eager")
    with torch.no_grad():
        _, cache = small(torch.arange(30)[None])
        _, cache = small(torch.tensor([[3]]), cache)
    assert kvpass.report(cache).to_dict()["slot_bytes"] == 2 * HEADS * 11 * DIM * 4


class Keeping(Base):
    """The cache is the module's own, rebound at each call, beside a count of tokens."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self.home, self.seen, self.counts = home, 0, [0]
        for name in ("ck", "cv"):
            if home == "buffer":
                self.register_buffer(name, None, persistent=False)
            else:
                setattr(self, name, None)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.project(ids)
        if self.home == "int":
            q, self.seen = q * (1 + 1e-3 * self.seen), self.seen + ids.shape[1]
        if self.home == "list":
            q = q * (1 + 1e-3 * self.counts[0])
            self.counts[0] += ids.shape[1]
        self.ck, self.cv = (k, v) if self.ck is None else (torch.cat([self.ck, k], 2), torch.cat([self.cv, v], 2))
        t, length = ids.shape[1], self.ck.shape[2]
        mask = torch.ones(t, length, dtype=torch.bool).tril(length - t)
        return F.scaled_dot_product_attention(q, self.ck, self.cv, attn_mask=mask)


@pytest.mark.parametrize("home", ["attribute", "buffer", "int", "list"])
def test_state_of_the_module_that_changes_at_each_call(home: str) -> None:
    calls = [torch.arange(20)[None], *(torch.tensor([[n]]) for n in range(40))]
    plain, compiled = Keeping(home).eval(), kvpass.compile(Keeping(home).eval(), "h2o", 1.0, inner="eager")
    with torch.no_grad():
        for ids in calls:
            torch.testing.assert_close(compiled(ids), plain(ids), **FLOAT32)
    assert len(compiled.kvpass.graphs) <= 4
    assert kvpass.report(compiled).to_dict()["tokens"] == 60


class Counting(Base):
    """Buffers of the module, written where its counter says, by an expression that stands there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(ROOM))
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, HEADS, ROOM, DIM))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        t = ids.shape[1]
        q, k, v = self.project(ids)
        self.k[:, :, self.places[:t]] = k
        self.v[:, :, self.places[:t]] = v
        self.places.add_(t)
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)


class CountingBetween(Counting):
    """The counter moves between the two: they are written at different places."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        t = ids.shape[1]
        q, k, v = self.project(ids)
        self.k[:, :, self.places[:t]] = k
        self.places.add_(t)
        self.v[:, :, self.places[:t]] = v
        return F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)


def test_an_index_written_twice_is_one() -> None:
    square = torch.ones(ROOM, ROOM, dtype=torch.bool).tril()
    plain, compiled = Counting().eval(), kvpass.compile(Counting().eval(), "h2o", 1.0, inner="eager")
    with torch.no_grad():
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
            ids, mask = torch.arange(start, end)[None], square[start:end]
            torch.testing.assert_close(compiled(ids, mask), plain(ids, mask), **FLOAT32)
    assert all(len(record.table.sites) == 1 for record in compiled.kvpass.graphs)


def test_an_index_that_changes_in_between_is_two() -> None:
    compiled = kvpass.compile(CountingBetween().eval(), "h2o", 1.0, inner="eager")
    mask = torch.ones(20, ROOM, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(kvpass.KVPassError, match="KEY_VALUE_MISMATCH"):
        compiled(torch.arange(20)[None], mask)


class OwnLength(Base):
    def forward(self, ids: Tensor, K: Tensor, V: Tensor, pos: Tensor) -> Tensor:
        q, k, v = self.project(ids)
        K.index_copy_(2, pos, k)
        V.index_copy_(2, pos, v)
        return F.scaled_dot_product_attention(q, K, V, attn_mask=torch.arange(K.shape[2])[None] <= pos[:, None])


def test_each_conversation_has_buffers_of_its_own_length() -> None:
    plain, compiled = OwnLength().eval(), kvpass.compile(OwnLength().eval(), "h2o", 1.0, inner="eager")
    for room in (40, 56, 48):
        ours, theirs = ([torch.zeros(1, HEADS, room, DIM) for _ in range(2)] for _ in range(2))
        with torch.no_grad():
            for start, end in ((0, 24), (24, 25), (25, 26)):
                ids, pos = torch.arange(start, end)[None], torch.arange(start, end)
                torch.testing.assert_close(compiled(ids, *ours, pos), plain(ids, *theirs, pos), **FLOAT32)


def test_buffers_of_two_lengths_are_refused() -> None:
    compiled = kvpass.compile(OwnLength().eval(), "h2o", 10, inner="eager")
    K, V = torch.zeros(1, HEADS, 40, DIM), torch.zeros(1, HEADS, 56, DIM)
    with torch.no_grad(), pytest.raises(Exception, match=r"room for 40 tokens, that of values for 56|size"):
        compiled(torch.arange(24)[None], K, V, torch.arange(24))


def test_forward_is_a_door_too() -> None:
    """The host calls model.forward(..), not model(..)."""
    compiled = kvpass.compile(ByCondition(CONDITIONS["no past"]).eval(), "h2o", 10, inner="eager")
    with torch.no_grad():
        _, cache = compiled.forward(torch.arange(30)[None])
        _, cache = compiled.forward(torch.tensor([[3]]), cache)
    assert kvpass.report(cache).to_dict()["slot_bytes"] == 2 * HEADS * 11 * DIM * 4
