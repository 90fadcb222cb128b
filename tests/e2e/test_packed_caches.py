"""Caches in which keys and values are not two tensors of four axes: joined, stacked, flat, without a head axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

HEADS, GROUP, DIM, WIDTH = 2, 2, 8, 32
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def causal(t: int, length: int) -> Tensor:
    return torch.ones(t, length, dtype=torch.bool).tril(length - t)


class Decoder(nn.Module):
    """One attention over `cache(new, past)`, which gives what is kept and the keys and values to attend to."""

    def __init__(self, keep: Callable[..., Any], heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.keep, self.heads = keep, heads
        self.emb, self.q = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, HEADS * GROUP * DIM)
        self.k, self.v = nn.Linear(WIDTH, heads * DIM), nn.Linear(WIDTH, heads * DIM)
        self.out = nn.Linear(HEADS * GROUP * DIM, 50)
        self.sees: Tensor | None = None

    def forward(self, ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        b, t = ids.shape
        x = self.emb(ids)
        q = self.q(x).view(b, t, -1, DIM).transpose(1, 2)
        kept, k, v = self.keep(self.k(x), self.v(x), past)
        mask = causal(t, k.shape[2]) if self.sees is None else self.sees
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.out(y.transpose(1, 2).reshape(b, t, -1)), kept


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def joined_entries(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, H, T, 2D]"""
    new = torch.cat([split(k), split(v)], -1)
    both = new if past is None else torch.cat([past, new], 2)
    return both, both[..., :DIM], both[..., DIM:]


def chunked_flat(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, T, 2 * H * D], taken apart by chunk"""
    new = torch.cat([k, v], -1)
    both = new if past is None else torch.cat([past, new], 1)
    k, v = both.chunk(2, -1)
    return both, split(k), split(v)


def viewed_flat(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, T, 2 * H * D], by a view and unbind"""
    new = torch.cat([k, v], -1)
    both = new if past is None else torch.cat([past, new], dim=1)
    k, v = both.view(both.shape[0], -1, 2, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return both, k, v


def per_head(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, T, H * 2D]: each head's key beside its value"""
    new = torch.stack([split(k), split(v)], 3).transpose(1, 2).flatten(2)
    both = new if past is None else torch.cat([past, new], 1)
    k, v = both.view(both.shape[0], -1, HEADS, 2 * DIM).transpose(1, 2).split(DIM, dim=-1)
    return both, k, v


def joined_heads(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, 2H, T, D]"""
    new = torch.cat([split(k), split(v)], 1)
    both = new if past is None else torch.cat([past, new], 2)
    return both, both[:, :HEADS], both.narrow(1, HEADS, HEADS)


def stacked(k: Tensor, v: Tensor, past: Any) -> Any:
    """[2, B, H, T, D]"""
    new = torch.stack([split(k), split(v)])
    both = new if past is None else torch.cat((past, new), -2)
    k, v = both
    return both, k, v


def stacked_inside(k: Tensor, v: Tensor, past: Any) -> Any:
    """[B, 2, H, T, D], by select"""
    new = torch.stack([split(k), split(v)], 1)
    both = new if past is None else torch.cat((past, new), 3)
    return both, both[:, 0], both.select(1, 1)


def flat_apart(k: Tensor, v: Tensor, past: Any) -> Any:
    """Two tensors [B, T, H * D]"""
    k, v = (k, v) if past is None else (torch.cat([old, new], 1) for old, new in zip(past, (k, v), strict=True))
    return (k, v), split(k), split(v)


def entries_first(k: Tensor, v: Tensor, past: Any) -> Any:
    """Keys as [B, H, D, T], as older models have them, values as [B, H, T, D]"""
    k, v = split(k).transpose(2, 3), split(v)
    if past is not None:
        k, v = torch.cat([past[0], k], 3), torch.cat([past[1], v], 2)
    return (k, v), k.transpose(2, 3), v


def tokens_before_sequences(k: Tensor, v: Tensor, past: Any) -> Any:
    """[T, B, H, D]"""
    k, v = (x.view(x.shape[0], x.shape[1], HEADS, DIM).transpose(0, 1) for x in (k, v))
    k, v = (k, v) if past is None else (torch.cat([old, new]) for old, new in zip(past, (k, v), strict=True))
    return (k, v), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def kept_with_more_axes(k: Tensor, v: Tensor, past: Any) -> Any:
    """What comes back covers the tensor that grew: a slice of all of it"""
    k, v = (split(k), split(v))
    k, v = (k, v) if past is None else (torch.cat([old, new], -2) for old, new in zip(past, (k, v), strict=True))
    return (k[..., 0:, :], v[:, :, 0:]), k, v


KEEPS = [
    joined_entries,
    chunked_flat,
    viewed_flat,
    per_head,
    joined_heads,
    stacked,
    stacked_inside,
    flat_apart,
    entries_first,
    tokens_before_sequences,
    kept_with_more_axes,
]


def run(model: Any, calls: list[Tensor]) -> tuple[list[Tensor], Any]:
    past, found = None, []
    with torch.no_grad():
        for ids in calls:
            out, past = model(ids, past)
            found.append(out)
    return found, past


def some(lengths: list[int], batch: int = 2, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (batch, n), generator=g) for n in lengths]


@pytest.mark.parametrize("keep", KEEPS, ids=lambda f: f.__name__)
def test_full_budget_is_the_model(keep: Any) -> None:
    """Prompt, steps, several tokens at once; and another conversation of another length."""
    model = kvpass.compile(Decoder(keep).eval(), "h2o", 1.0, inner="eager", verify=True)
    for lengths, seed in (([20, 1, 1, 1, 4, 1], 0), ([27, 1, 1], 1)):
        calls = some(lengths, seed=seed)
        torch.testing.assert_close(run(model, calls)[0], run(Decoder(keep).eval(), calls)[0], **FLOAT32)
    assert len(model.kvpass.graphs) <= 6
    assert all(len(record.table.sites) == 1 for record in model.kvpass.graphs)


@pytest.mark.parametrize("keep", KEEPS, ids=lambda f: f.__name__)
def test_evicted_tokens_are_gone_and_no_others(keep: Any) -> None:
    """Each step is the model's own over the tokens that were kept: the others are hidden from it."""
    budget, calls = 10, some([24, 1, 1, 1, 1])
    model = kvpass.compile(Decoder(keep).eval(), "streaming_llm", budget, inner="eager")
    plain = Decoder(keep).eval()
    past, dense, length = None, None, 0
    with torch.no_grad():
        for ids in calls:
            held = kvpass.inspect(past).layers[0].positions[0, 0].tolist() if past is not None else []
            out, past = model(ids, past)
            length += ids.shape[1]
            plain.sees = None
            if held:
                visible = torch.zeros(1, length, dtype=torch.bool)
                visible[0, [*held, length - 1]] = True
                plain.sees = visible
            expected, dense = plain(ids, dense)
            torch.testing.assert_close(out, expected, **FLOAT32)
    report = kvpass.report(past).to_dict()
    assert report["slot_bytes"] == 2 * 2 * HEADS * (budget + 1) * DIM * 4
    held_by_host = [past] if isinstance(past, Tensor) else past
    assert all(t.untyped_storage().nbytes() <= 4 for t in held_by_host)
