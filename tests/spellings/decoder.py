"""A decoder in a given spelling. It runs by the protocol of tests/models/styles/style.py: `init_cache`, then `step`."""

from __future__ import annotations

from typing import Any

import torch
from spellings import homes, masking
from spellings.attending import ATTENTIONS
from spellings.laid_out import AXES, Cells, joined, laid_out, room_shape, taken_apart, with_heads
from spellings.reading import READS, covering, end_of
from spellings.spelling import Spelling
from spellings.writing import WRITES, index_of
from torch import Tensor, nn

VOCABULARY, HEADS, DIM, MEMORIES = 31, 4, 8, 2
WIDTH, LONGEST = HEADS * DIM, 28


def kv_heads(spelling: Spelling) -> int:
    return {"none": HEADS, "mqa": 1}.get(spelling.heads, 2)


def slopes() -> Tensor:
    return 2.0 ** -(torch.arange(1, HEADS + 1) * 8.0 / HEADS)


def rotary(x: Tensor, index: Tensor) -> Tensor:
    """Rotate [B, S, H, D] by positions [S]."""
    angle = index[:, None] * 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Layer(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling, self.kv_heads = spelling, kv_heads(spelling)
        self.wqkv = nn.Linear(WIDTH, WIDTH + 2 * self.kv_heads * DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.write, self.read, self.attend = (
            WRITES[spelling.write],
            READS[spelling.read],
            ATTENTIONS[spelling.attention],
        )
        if spelling.beside == "memory":
            self.memory_k, self.memory_v = (nn.Parameter(torch.randn(self.kv_heads, MEMORIES, DIM)) for _ in range(2))
        if spelling.home == "buffer":
            self.register_buffer("keys", None, persistent=False)
            self.register_buffer("values", None, persistent=False)
        self.hold(None)

    def hold(self, cells: Cells | None) -> None:
        if self.spelling.in_module:
            self.keys = None if cells is None else cells[0]
            self.values = None if cells is None or len(cells) == 1 else cells[1]

    def held(self) -> Cells | None:
        if self.keys is None:
            return None
        return (self.keys,) if self.values is None else (self.keys, self.values)

    def new(self, x: Tensor, index: Tensor) -> tuple[Tensor, Cells]:
        """Queries [B, S, H, D], and what is to be cached."""
        s = self.spelling
        b, t, _ = x.shape
        fused = self.wqkv(x)
        q, k, v = fused.split([WIDTH, self.kv_heads * DIM, self.kv_heads * DIM], dim=-1)
        q = q.view(b, t, HEADS, DIM)
        if s.positions == "rotary":
            q = rotary(q, index)
        if s.parts == "packed":
            return q, (fused[..., WIDTH:],)
        k, v = k.view(b, t, -1, DIM), v.view(b, t, -1, DIM)
        if s.positions == "rotary" and s.beside != "unrotated":
            k = rotary(k, index)
        k, v = laid_out(s.layout, k), laid_out(s.layout, v)
        return q, joined(s.parts, s.layout, k, v)

    def cached(self, held: Cells | None, new: Cells, place: Any, room: int) -> tuple[Cells, Cells]:
        """The cache with the new tokens in it, and what of it is to be attended to."""
        s, axis = self.spelling, new[0].dim() + AXES[self.spelling.layout]
        if held is None and s.origin == "nothing":
            written = new
        else:
            written = self.written(self.first(new, room) if held is None else held, new, place, axis)
        end = end_of(place, new[0].shape[axis]) if s.read in ("front", "narrow", "front_tensor") else None
        return written, tuple(self.read(cell, end, axis) for cell in written)

    def written(self, held: Cells, new: Cells, place: Any, axis: int) -> Cells:
        s = self.spelling
        if s.read == "batch":
            held = tuple(cell[: new[0].shape[0]] for cell in held)
        if s.parts == "unbound":
            (past_k, past_v), (k, v) = held[0], new[0]
            return (torch.stack([self.write(past_k, k, place, axis - 1), self.write(past_v, v, place, axis - 1)]),)
        return tuple(self.write(cell, one, place, axis) for cell, one in zip(held, new, strict=True))

    def first(self, new: Cells, room: int) -> Cells:
        """The buffers of a first call that was given none."""
        s = self.spelling
        shape = room_shape(s.parts, s.layout, new_batch(s, new), self.kv_heads, room, DIM)
        keys = torch.zeros(shape)
        if len(new) == 1:
            return (keys,)
        return keys, torch.zeros_like(keys) if s.origin == "made_like" else torch.zeros(shape)

    def forward(
        self, x: Tensor, held: Cells | None, place: Any, mask: Tensor | None, square: Tensor, room: int
    ) -> tuple[Tensor, Cells]:
        """What comes out, and the cells that are the cache from now on.

        Args:
            place: where the new tokens begin (writing.py).
            mask: the host's, or None.
            square: who may see whom in the longest sequence.
        """
        s, count = self.spelling, x.shape[1]
        q, new = self.new(x, index_of(place, count))
        written, read = self.cached(held, new, place, room)
        k, v = (with_heads(s.layout, t, DIM) for t in taken_apart(s.parts, s.layout, read))
        length = k.shape[2] if s.layout == "bhtd" else k.shape[1]
        causal = (s.mask == "causal" and count > 1) or (s.mask == "causal_both" and (count == length and count > 1))
        bias = None
        if s.mask in masking.MASKS:
            mask = masking.MASKS[s.mask](square, place, count, length)
        if s.beside == "window" and s.mask != "host":
            mask = masking.within_window(mask, place, count)
        if s.positions == "alibi":
            bias = masking.distances(slopes(), place, count, length)
        if s.beside == "unrotated":
            k = self.rotated(k, length)
        if s.beside == "memory":
            k, v, mask, bias = self.with_memory(k, v, mask, bias)
        y = self.attend(s, q, k, v, mask, bias, causal)
        return self.wo(y.flatten(2)), written

    def rotated(self, k: Tensor, length: int) -> Tensor:
        """Keys that are cached as they were."""
        index = torch.arange(length)
        if self.spelling.layout == "bhtd":
            return rotary(k.transpose(1, 2), index).transpose(1, 2)
        return rotary(k.unsqueeze(2), index).squeeze(2) if k.dim() == 3 else rotary(k, index)

    def with_memory(self, k: Tensor, v: Tensor, mask: Any, bias: Any) -> tuple[Tensor, Tensor, Any, Any]:
        """Learned keys and values in front, which every query sees."""
        memory_k, memory_v, axis = self.memory_k, self.memory_v, 2
        if k.dim() == 3:
            memory_k, memory_v, axis = memory_k[0], memory_v[0], 1
        elif self.spelling.layout != "bhtd":
            memory_k, memory_v, axis = memory_k.transpose(0, 1), memory_v.transpose(0, 1), 1
        k, v = (torch.cat([m.expand(x.shape[0], *m.shape), x], dim=axis) for m, x in ((memory_k, k), (memory_v, v)))
        mask = torch.cat([torch.ones(*mask.shape[:-1], MEMORIES, dtype=torch.bool), mask], dim=-1)
        if bias is not None:
            bias = torch.cat([torch.zeros(*bias.shape[:-1], MEMORIES), bias], dim=-1)
        return k, v, mask, bias


def new_batch(s: Spelling, new: Cells) -> int:
    return new[0].shape[1] if s.parts == "stacked" else new[0].shape[0]


class Decoder(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        if spelling.positions == "learned":
            self.learned = nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer(spelling) for _ in range(spelling.layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("causal", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("counter", torch.tensor(0), persistent=False)
        self.register_buffer("range", torch.arange(LONGEST), persistent=False)
        self.at, self.room = 0, LONGEST

    def init_cache(self, batch: int, room: int) -> Any:
        """An empty cache for a conversation of at most `room` tokens."""
        s, self.at, self.room = self.spelling, 0, room
        self.counter.zero_()
        self.range.copy_(torch.arange(LONGEST))
        tokens = 0 if s.origin == "empty" else room
        shape = room_shape(s.parts, s.layout, batch, kv_heads(s), tokens, DIM)
        shapes = [[shape] * (2 if s.parts == "apart" else 1) for _ in self.layers]
        if s.in_module:
            for layer, cells in zip(self.layers, homes.allocated(s, shapes), strict=True):
                layer.hold(cells)
        return homes.before_first_call(s, shapes)

    def begins(self, given: Any, cache: Any) -> Any:
        """Where this call's tokens begin: an int, a tensor, or their positions."""
        s = self.spelling
        if s.carried == "length":
            cells = homes.taken(s, cache, self.layers[0], 0)
            return 0 if cells is None else cells[0].shape[AXES[s.layout]]
        if s.carried == "counter":
            return self.counter
        if s.carried == "range":
            return (self.range,)
        if s.carried == "module_int":
            return self.at
        return cache.at if s.carried == "object_int" else given

    def advance(self, cache: Any, count: int) -> None:
        if self.spelling.carried == "counter":
            self.counter += count
        elif self.spelling.carried == "range":
            self.range.add_(count)
        elif self.spelling.carried == "module_int":
            self.at += count
        elif self.spelling.carried == "object_int":
            cache.at += count

    def forward(self, ids: Tensor, cache: Any = None, where: Any = None, mask: Tensor | None = None) -> Any:
        s, count = self.spelling, ids.shape[1]
        place = self.begins(where, cache)
        if s.index == "once" and not s.counts and s.carried != "length":
            place = index_of(place, count)
        x = self.embed(ids)
        if s.positions == "learned":
            x = x + self.learned(index_of(place, count))
        grown, covers, axis = [], s.returned == "covered", AXES[s.layout]
        for i, layer in enumerate(self.layers):
            held = homes.taken(s, cache, layer, i)
            y, cells = layer(x, held, place, mask, self.causal, self.room)
            if held is None or not s.in_place:
                homes.put(s, cache, layer, i, cells)
            grown.append(tuple(covering(cell, None, cell.dim() + axis) for cell in cells) if covers else cells)
            x = x + y
        self.advance(cache, count)
        return homes.returned(s, self.head(x), cache, grown)

    def step(self, ids: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
        """As the host calls it."""
        s, count = self.spelling, ids.shape[1]
        where = {"int": start, "tensor": torch.tensor(start), "index": torch.arange(start, start + count)}
        length = start + count if s.ends_with_new else self.room
        mask = None
        if s.mask == "host":
            mask = torch.ones(count, length, dtype=torch.bool).tril(start)
            if s.beside == "window":
                mask &= ~torch.ones(count, length, dtype=torch.bool).tril(start - masking.WINDOW)
            mask = mask[None, None]
        arguments = (homes.given(s, cache, len(self.layers)), where.get(s.carried), mask)
        return homes.unpacked(s, self(ids, *arguments), cache)


def make(spelling: Spelling) -> Decoder:
    """With weights so large that attention is far from uniform."""
    torch.manual_seed(4)
    model = Decoder(spelling).eval()
    for layer in model.layers:
        nn.init.normal_(layer.wqkv.weight[:WIDTH], std=0.5)
        nn.init.normal_(layer.wqkv.weight[WIDTH : WIDTH + layer.kv_heads * DIM], std=0.5)
    return model
