"""window_rows, value weights, pooling by granule, shares of heads: each against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kvpass.kernels.rank.allocate import head_counts, ragged_columns, table_counts
from kvpass.kernels.rank.criterion import UNTOUCHABLE
from kvpass.kernels.rank.scorers.chance import gumbel_rows
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.scorers.window import keyformer
from kvpass.kernels.rank.smooth import by_granule, fair_shares
from kvpass.kernels.rank.weights import value_weights
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, causal_mask, qkv

INF = float("inf")


def naive_rows(q, k, mask, pos, valid, w, scale, causal, sinks, softcap, kind):
    """[B, Hkv, G, w, L] in float64, a query and a key at a time."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    w = min(w, queries)
    out = torch.full((batch, kv_heads, group, w, keys), 0.0 if kind == "rows" else -INF, dtype=torch.float64)
    for b in range(batch):
        last = [i for i in range(queries) if valid[b, i]][-w:]
        for h in range(heads):
            for row, i in enumerate(last, start=w - len(last)):
                logits = torch.full((keys,), -INF, dtype=torch.float64)
                for j in range(keys):
                    p = j if pos is None else int(pos[b, h // group, j])
                    if p < 0 or (causal and p > i):
                        continue
                    x = float(q[b, h, i].double() @ k[b, h // group, j].double()) * scale
                    x = softcap * math.tanh(x / softcap) if softcap else x
                    if mask is not None:
                        m = mask[min(b, len(mask) - 1), min(h, mask.shape[1] - 1), min(i, mask.shape[2] - 1)]
                        m = m[min(p, len(m) - 1)]
                        if mask.dtype == torch.bool:
                            if not m:
                                continue
                        elif m < -1e8:
                            continue
                        else:
                            x += float(m)
                    logits[j] = x
                if kind == "rows":
                    total = logits.exp().sum() + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                    logits = logits.exp() / total
                out[b, h // group, h % group, row] = logits
    return out


@pytest.mark.parametrize("kind", ["rows", "logits"])
@pytest.mark.parametrize("case", ["causal", "left padded", "right padded", "float mask", "extend", "sinks and cap"])
def test_window_rows(kind, case):
    batch, heads, kv_heads, queries, keys, w = 2, 6, 2, 9, 9, 4
    pos = mask = sinks = None
    causal, softcap = case in ("causal", "sinks and cap"), 0.0
    valid = torch.ones(batch, queries, dtype=torch.bool)
    if case == "left padded":
        mask = causal_mask(queries, keys, left=[0, 7])
        valid[1, :7] = False
    elif case == "right padded":
        mask = causal_mask(queries, keys, right=[3, 0])
        valid[0, 6:] = False
    elif case == "float mask":
        slope = torch.linspace(0, -1, keys).expand(1, heads, queries, keys) * torch.arange(1, heads + 1).view(-1, 1, 1)
        mask = slope.masked_fill(~causal_mask(queries, keys), torch.finfo(torch.float32).min)
    elif case == "extend":
        keys = 13
        pos = torch.tensor([-1, 2, 5, 7, *range(10, 19)], dtype=torch.int32).expand(batch, kv_heads, keys).contiguous()
        mask = torch.ones(queries, 19, dtype=torch.bool).tril(10)[None, None]
    elif case == "sinks and cap":
        sinks, softcap = torch.randn(heads, generator=torch.Generator().manual_seed(5)), 3.0
    q, k, _ = qkv(batch, heads, kv_heads, queries, 8, keys=keys)
    rule = Rule(queries=w, reads=(kind,)).encode()
    got = window_rows(q, k, pos, mask, valid, 0.3, "causal" * causal, rule, sinks, softcap)
    want = naive_rows(q, k, mask, pos, valid, w, 0.3, causal, sinks, softcap, kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", ["l1", "l2", "vo_l1", "vo_l1_share"])
def test_value_weights(kind):
    g = torch.Generator().manual_seed(0)
    batch, kv_heads, group, length, wide, size = 2, 2, 3, 5, 4, 7
    v = torch.randn(batch, kv_heads, length, wide, generator=g)
    wo = torch.randn(size, kv_heads * group * wide, generator=g)
    want = torch.zeros(batch, kv_heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            for j in range(length):
                value = v[b, h, j].double()
                if kind[:2] == "vo":
                    heads = range(h * group, (h + 1) * group)
                    parts = [wo[:, n * wide : (n + 1) * wide].double() @ value for n in heads]
                    want[b, h, j] = sum(float(p.abs().sum()) for p in parts) / group
                else:
                    want[b, h, j] = value.abs().sum() if kind == "l1" else math.sqrt(float((value**2).sum()))
    if kind == "vo_l1_share":
        want = want / want.sum(1, keepdim=True)
    assert_close(value_weights(kind, v, wo), want.float(), stats=True)


def test_granules_are_counted_from_the_first_token():
    value = torch.tensor([[[9.0, 1.0, 3.0, 2.0, 6.0, 4.0, 5.0]]])
    pos = torch.tensor([[[0, 2, 3, 4, 5, 6, 7]]], dtype=torch.int32)
    candidate = torch.tensor([[[False, True, True, True, True, True, True]]])
    first = torch.tensor([[[2]]])
    mean = by_granule(value, pos, candidate, first, Rule(granule=4))
    assert mean.flatten().tolist() == [9.0, 3.0, 3.0, 3.0, 3.0, 4.5, 4.5]
    best = by_granule(value, pos, candidate, first, Rule(granule=4, granule_by="top_half"))
    assert best.flatten().tolist() == [9.0, 4.5, 4.5, 4.5, 4.5, 5.0, 5.0]


def test_fair_shares():
    value = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0, 9.0]]])
    span = torch.tensor([[[0, 0, 0, 0, 1, 1]]])
    candidate = torch.ones(1, 1, 6, dtype=torch.bool)
    assert fair_shares(value, span, candidate).flatten().tolist() == [-0.125, -0.375, -0.625, -0.875, -0.75, -0.25]


def naive_counts(score, candidate, n, safe):
    """Of one row: [H, L] lists."""
    heads, length = len(score), len(score[0])
    keys = [(h, j) for h in range(heads) for j in range(length) if candidate[h][j]]
    ranked = {h: sorted((j for g, j in keys if g == h), key=lambda j, h=h: (-score[h][j], j)) for h in range(heads)}
    sure = {(h, j) for h in range(heads) for j in ranked[h][:safe]}

    def order(key):
        h, j = key
        value = max(score[h][j], UNTOUCHABLE) if key in sure else score[h][j]
        return -value, j, h

    kept = sorted(keys, key=order)[: heads * n]
    return [sum(h == head for h, _ in kept) for head in range(heads)]


@pytest.mark.parametrize("seed", range(20))
def test_head_counts(seed):
    g = torch.Generator().manual_seed(seed)
    batch, heads, length = 2, 3, 12
    score = torch.randint(0, 6, (batch, heads, length), generator=g).float()  # many ties
    candidate = torch.rand(batch, heads, length, generator=g) > 0.2
    score[:, :, -2:] = INF
    candidate[:, :, -2:] = True
    score = score.masked_fill(~candidate, -INF)
    rule = Rule(ragged=True, safe_num=1, safe_den=3)
    n = int(torch.randint(3, 11, (), generator=g))
    size = torch.full((batch, heads, 1), n)
    got = head_counts(score, candidate, size, rule)
    want = [naive_counts(score[b].tolist(), candidate[b].tolist(), n, max(1, n // 3)) for b in range(batch)]
    assert got.tolist() == want
    extra, shift = ragged_columns(got, size)
    for b in range(batch):
        assert sum(extra[b].tolist()) <= 0
        assert shift[b].tolist() == [sum(extra[b, :h].tolist()) for h in range(heads)]


def test_shares_by_a_table(tmp_path):
    path = tmp_path / "heads.pt"
    torch.save({"heads": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])}, path)
    candidate = torch.ones(1, 3, 100, dtype=torch.bool)
    size, protected = torch.full((1, 3, 1), 20), torch.full((1, 3, 1), 5)
    rule = Rule(ragged=True, table=str(path))
    assert table_counts(candidate, size, protected, rule).tolist() == [[27, 6, 27]]
    with pytest.raises(ValueError, match=r"layer 1 is \[0.0, 0.0, 0.0\]"):
        table_counts(candidate, size, protected, Rule(ragged=True, table=str(path), layer=1))


def test_keyformer():
    """Sum over the window's queries of softmax((z + noise) / temperature), mean over the group; hidden keys get 0."""
    g = torch.Generator().manual_seed(2)
    batch, heads, group, w, length = 2, 2, 3, 4, 9
    logits = torch.randn(batch, heads, group, w, length, generator=g)
    logits[..., 0, -3:] = -INF
    pos = torch.arange(length, dtype=torch.int32).expand(batch, heads, length)
    one = torch.ones(batch, heads, 1, dtype=torch.int64)
    seen = Seen(
        pos=pos, candidate=pos >= 0, end=one * length, first=one * 0, seen=one * length, budget=one * 5, window=w,
        seed=3, k=None, v=None, rows=logits, statistics={}, at=1,
    )  # fmt: skip
    noise = gumbel_rows(seen)
    assert abs(float(noise.mean()) - 0.5772) < 0.15
    assert len(noise.flatten().unique()) > 0.99 * noise[0].numel()  # rows of a batch draw alike
    want = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for n in range(group):
                for i in range(w):
                    z = [(float(logits[b, h, n, i, j]) + float(noise[b, h, n, i, j])) / 1.5 for j in range(length)]
                    total = sum(math.exp(x) for x in z)
                    for j in range(length):
                        want[b, h, j] += math.exp(z[j]) / total / group
    torch.testing.assert_close(keyformer(seen, temperature=1.5).double(), want, atol=1e-6, rtol=1e-5)
