"""Ways to write a call's tokens into a buffer, and to read what is written: each is matched, exact, and evicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

BATCH, HEADS, DIM, WIDTH, ROOM, PROMPT = 2, 2, 8, 16, 40, 20
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


class Decoder(nn.Module):
    """One attention over buffers that the caller owns. Subclasses write, and read what they wrote."""

    axis, room = 2, ROOM

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb, self.qkv, self.out = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 50)
        self.hidden: list[int] = []

    def buffers_for(self) -> tuple[Tensor, Tensor]:
        sizes = [BATCH, HEADS, self.room, DIM] if self.axis == 2 else [BATCH, self.room, HEADS, DIM]
        return torch.zeros(sizes), torch.zeros(sizes)

    def forward(self, ids: Tensor, K: Tensor, V: Tensor, pos: Any) -> tuple[Tensor, Any]:
        b, t = ids.shape
        q, k, v = self.qkv(self.emb(ids)).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        if self.axis == 1:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        K, V = self.write(K, k, pos, t), self.write(V, v, pos, t)
        k, v, mask = self.read(K, V, pos, t)
        if self.axis == 1:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.shown(mask))
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH)), (K, V)

    def shown(self, mask: Tensor) -> Tensor:
        """The mask, without what a replay hides."""
        if self.hidden:
            keep = torch.ones(mask.shape[-1], dtype=torch.bool)
            keep[self.hidden] = False
            mask = mask & keep
        return mask

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        buffer[:, :, pos] = new
        return buffer

    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        """All of it, under a mask."""
        return K, V, torch.arange(K.shape[self.axis])[None, :] <= self.places(pos, t)[:, None]

    def places(self, pos: Any, t: int) -> Tensor:
        return pos if isinstance(pos, Tensor) else torch.arange(pos, pos + t)

    def given(self, start: int, t: int) -> Any:
        """The position as the caller says it."""
        return torch.arange(start, start + t)


class ByNumber(Decoder):
    """The position is an int."""

    def given(self, start: int, t: int) -> Any:
        return start

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        buffer[:, :, pos : pos + t] = new
        return buffer

    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        end = pos + t
        return K[:, :, :end], V[:, :, :end], torch.ones(t, end, dtype=torch.bool).tril(end - t)


class ReadByNarrow(ByNumber):
    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        end = pos + t
        mask = torch.ones(t, end, dtype=torch.bool).tril(end - t)
        return K.narrow(2, 0, end), V.narrow(2, 0, end), mask


class CoveringSlices(Decoder):
    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        _, _, mask = super().read(K, V, pos, t)
        return K[..., 0:, :], V[..., :ROOM, :], mask


class RowsOfTheBatch(ByNumber):
    """A buffer for more sequences than there are."""

    def buffers_for(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(4, HEADS, ROOM, DIM), torch.zeros(4, HEADS, ROOM, DIM)

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        buffer[: len(new), :, pos : pos + t] = new
        return buffer

    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        end, b = pos + t, BATCH
        return K[:b, :, :end], V[:b, :, :end], torch.ones(t, end, dtype=torch.bool).tril(end - t)


class ReadToTheEndGiven(Decoder):
    """Index tensor and, apart from it, how far to read."""

    def given(self, start: int, t: int) -> Any:
        return torch.arange(start, start + t), start + t

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        return buffer.index_copy_(2, pos[0], new)

    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        index, end = pos
        return K[..., :end, :], V[..., :end, :], (torch.arange(K.shape[2])[None] <= index[:, None])[:, :end]


class RowAndPlace(Decoder):
    """index_put_ with rows and positions, tokens before heads"""

    axis = 1

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        rows = torch.arange(buffer.shape[0])
        buffer[rows[:, None], pos[None, :]] = new
        return buffer


class _IndexPut(Decoder):
    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        return (
            buffer.transpose(1, 2).index_put_((torch.arange(BATCH)[:, None], pos), new.transpose(1, 2)).transpose(1, 2)
        )


class Flat(ByNumber):
    """[B, T, H * D]"""

    axis = 1

    def buffers_for(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(BATCH, ROOM, WIDTH), torch.zeros(BATCH, ROOM, WIDTH)

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        buffer[:, pos : pos + t] = new.flatten(2)
        return buffer

    def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
        end = pos + t
        k, v = (x[:, :end].view(BATCH, -1, HEADS, DIM) for x in (K, V))
        return k, v, torch.ones(t, end, dtype=torch.bool).tril(end - t)


class ExactFit(ByNumber):
    """A prompt that fills its buffer; nothing comes behind it."""

    room = PROMPT


class ExactFitByNarrow(ExactFit):
    """The part that is written is all of it."""

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        buffer.narrow(2, pos, t).copy_(new)
        return buffer


class Blended(Decoder):
    """One token at a time: where its place is hit"""

    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        return torch.where((torch.arange(buffer.shape[2]) == pos)[:, None], new, buffer)


class Product(Decoder):
    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        hit = F.one_hot(pos, buffer.shape[2]).to(new.dtype).view(1, 1, -1, 1)
        return buffer * (1 - hit) + hit * new


class Filled(Decoder):
    def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
        miss = torch.arange(buffer.shape[2])[:, None] != pos
        return new * ~miss + buffer.masked_fill(~miss, 0)


WRITES = [Decoder, ByNumber, ReadByNarrow, CoveringSlices, RowsOfTheBatch, ReadToTheEndGiven, RowAndPlace, Flat]
ONE_BY_ONE = [Blended, Product, Filled]


def run(model: Any, calls: list[Tensor], replay: list[list[int]] | None = None) -> tuple[list[Tensor], Any]:
    """Logits call by call; with `replay`, of the unmodified model that sees only some positions in each call."""
    found, start = [], 0
    cache = model.buffers_for()
    with torch.no_grad():
        for at, ids in enumerate(calls):
            t = ids.shape[1]
            if replay is not None:
                model.hidden = sorted(set(range(start)) - set(replay[at])) if start else []
            out, cache = model(ids, *cache, model.given(start, t))
            found.append(out)
            start += t
    return found, cache


def some(lengths: list[int], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (BATCH, n), generator=g) for n in lengths]


def lengths_of(kind: Any) -> list[list[int]]:
    if kind in ONE_BY_ONE:
        return [[1] * 18, [1] * 4]
    return [[PROMPT]] if issubclass(kind, ExactFit) else [[PROMPT, 1, 1, 1], [PROMPT + 5, 1, 1]]


@pytest.mark.parametrize("kind", [*WRITES, *ONE_BY_ONE, ExactFit, ExactFitByNarrow], ids=lambda kind: kind.__name__)
@pytest.mark.some(6)
def test_full_budget_is_the_model(kind: Any) -> None:
    model = kvpass.compile(kind().eval(), "h2o", 1.0, inner="eager")
    for seed, lengths in enumerate(lengths_of(kind)):
        calls = some(lengths, seed)
        torch.testing.assert_close(run(model, calls)[0], run(kind().eval(), calls)[0], **FLOAT32)
    assert all(len(record.table.sites) == 1 for record in model.kvpass.graphs)
    assert len(model.kvpass.graphs) <= 5


@pytest.mark.parametrize("kind", [*WRITES, *ONE_BY_ONE], ids=lambda kind: kind.__name__)
def test_evicted_tokens_are_gone_and_no_others(kind: Any) -> None:
    budget, calls = 10, some(lengths_of(kind)[0])
    model = kvpass.compile(kind().eval(), "streaming_llm", budget, inner="eager")
    kept: list[list[int]] = []
    found, cache, start = [], model.buffers_for(), 0
    with torch.no_grad():
        for ids in calls:
            t = ids.shape[1]
            kept.append(kvpass.inspect(cache).layers[0].positions[0, 0].tolist() if start else [])
            out, cache = model(ids, *cache, model.given(start, t))
            found.append(out)
            start += t
    torch.testing.assert_close(found, run(kind().eval(), calls, kept)[0], **FLOAT32)
    assert len(kept[-1]) == budget
    assert kvpass.report(cache).to_dict()["slot_bytes"] == 2 * BATCH * HEADS * (budget + 1) * DIM * 4


@pytest.mark.parametrize("kind", ONE_BY_ONE, ids=lambda kind: kind.__name__)
def test_a_blended_buffer_is_not_held(kind: Any) -> None:
    model = kvpass.compile(kind().eval(), "streaming_llm", 10, inner="eager")
    _, cache = run(model, some([1] * 12))
    assert all(t.untyped_storage().nbytes() < 400 for t in cache)


def test_an_end_that_is_not_the_end_is_refused() -> None:
    class Wrong(ReadToTheEndGiven):
        def read(self, K: Tensor, V: Tensor, pos: Any, t: int) -> Any:
            k, v, _ = super().read(K, V, pos, t)
            return k, v, torch.ones(1, 1, dtype=torch.bool)

        def given(self, start: int, t: int) -> Any:
            return torch.arange(start, start + t), start + t + 3

    model = kvpass.compile(Wrong().eval(), "h2o", 10, inner="eager")
    with pytest.raises(kvpass.KVPassError, match="reads 23 tokens of its buffer, of which 20 are written"):
        run(model, some([PROMPT]))


def test_a_blend_at_another_place_is_no_update() -> None:
    """Two tokens of the buffer are overwritten: that is no cache that grows."""

    class Twice(Decoder):
        def write(self, buffer: Tensor, new: Tensor, pos: Any, t: int) -> Tensor:
            at = torch.arange(buffer.shape[2])
            return torch.where(((at == pos) | (at == pos - 1))[:, None], new, buffer)

    model = kvpass.compile(Twice().eval(), "h2o", 10, inner="eager")
    with pytest.raises(kvpass.KVPassError):
        run(model, some([1, 1]))
