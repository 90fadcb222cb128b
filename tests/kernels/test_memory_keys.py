"""Memory keys beside a cache, against plain loops: in a prefill, in a step in all its forms, in rows of a window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.attention.memory import softmax_of
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.functional import decode_step
from kvpass.kernels.decode_attend.triton import supports
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.testing import assert_close, qkv
from models.states import builtin, same, state_under
from torch import Tensor

SEEN, SCALE = 240, 0.3
SINKS = torch.tensor([0.7, -1.5, 4.0, 2.0])


def memory(heads: int, rows: int = 1, seed: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, 3, 16, generator=g), torch.randn(rows, heads, 3, 16, generator=g)


def loops(
    q: Tensor, k: Tensor, v: Tensor, sees: Any, beside: tuple[Tensor, Tensor], sinks: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out, probabilities of the keys [B, Hq, S, L]); `sees(b, h, i, j)`: whether query i sees key j of a KV head."""
    (batch, heads, count, _), length, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    shared = heads // beside[0].shape[1]
    out, probs = torch.zeros_like(q, dtype=torch.float64), torch.zeros(batch, heads, count, length, dtype=torch.float64)

    def weight(a: Tensor, b: Tensor) -> float:
        logit = float(a.double() @ b.double()) * SCALE
        return math.exp(softcap * math.tanh(logit / softcap) if softcap else logit)

    for b in range(batch):
        own = min(b, len(beside[0]) - 1)
        for h in range(heads):
            for i in range(count):
                seen = [j for j in range(length) if sees(b, h // group, i, j)]
                of_keys = [weight(q[b, h, i], k[b, h // group, j]) for j in seen]
                of_memory = [weight(q[b, h, i], one) for one in beside[0][own, h // shared]]
                total = sum(of_keys) + sum(of_memory) + (0.0 if sinks is None else math.exp(float(sinks[h])))
                for j, w in zip(seen, of_keys, strict=True):
                    probs[b, h, i, j] = w / total
                    out[b, h, i] += w / total * v[b, h // group, j].double()
                for w, value in zip(of_memory, beside[1][own, h // shared], strict=True):
                    out[b, h, i] += w / total * value.double()
    return out, probs


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [2, 4], ids=["of KV heads", "of query heads"])
@pytest.mark.parametrize(("sinks", "softcap"), [(None, 0.0), (SINKS, 0.0), (None, 1.5), (SINKS, 1.5)])
def test_prefill(heads: int, rows: int, sinks: Tensor | None, softcap: float) -> None:
    q, k, v = qkv(2, 4, 2, 11, 16)
    rule, beside = builtin()["h2o"], memory(heads, rows)
    more = sinks, softcap
    out, stats, valid = prefill_attend(
        q, k, v, None, None, SCALE, "causal", rule.encode(), *more, memory_k=beside[0], memory_v=beside[1]
    )
    expected, probs = loops(q, k, v, lambda b, h, i, j: j <= i, beside, *more)
    assert_close(out, expected.float(), what="out")
    assert_close(stats[0], probs.sum(2).unflatten(1, (2, 2)).mean(2).float(), what="sums of shares")
    assert bool(valid.all())


@pytest.mark.parametrize("kind", ["bool", "numbers", "tokens"])
def test_padding_sees_the_memory_alone(kind: str) -> None:
    """Also where numbers hide: the memory is not hidden by them, so that nothing is averaged."""
    q, k, v = qkv(2, 4, 2, 11, 16)
    shown = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    shown[0, :, :, :4] = False
    numbers = torch.zeros(2, 1, 11, 11).masked_fill(~shown, torch.finfo(torch.float32).min)
    tokens, beside = torch.ones(2, 11, dtype=torch.bool), memory(2)
    tokens[0, :4] = False
    mask = {"bool": shown, "numbers": numbers}.get(kind)
    words = "causal mean" if kind == "tokens" else ""
    told: dict[str, Any] = {"tokens": tokens} if kind == "tokens" else {}
    out, _, valid = prefill_attend(
        q, k, v, None, mask, SCALE, words, builtin()["h2o"].encode(), memory_k=beside[0], memory_v=beside[1], **told
    )
    expected, _ = loops(q, k, v, lambda b, h, i, j: bool(shown[b, 0, i, j]), beside, None, 0.0)
    assert_close(out, expected.float(), what="out")
    assert valid.tolist() == tokens.tolist()


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "ada_snapkv", "roco", "cascading"])
def test_a_step_reads_nothing_back_and_does_the_same(name: str, sinks: Tensor | None) -> None:
    rule, beside = builtin()[name], memory(2, 2)
    got = state_under(rule, SEEN)
    want, first = got.clone(), got.clone()
    for i in range(3):
        q, k, v = qkv(2, 4, 2, 1, 16, keys=1, seed=i)
        tokens = torch.ones(2, SEEN + 4, dtype=torch.bool)
        tokens[1, SEEN + 1] = False  # one row carries a pad
        softmax = softmax_of("test", q, SCALE, sinks, 0.8, *beside)
        call = Call.of_step(None, SEEN + i, softmax, rule, 0, "causal", tokens)
        before = got.clone()
        x = decode_attend_device(Token(q, k, v), got, call)
        y = decode_attend(
            q, k, v, None, [*want.tensors()], SEEN + i, SCALE, rule.encode(), sinks, 0.8, sees="causal", tokens=tokens,
            memory_k=beside[0], memory_v=beside[1],
        )  # fmt: skip
        assert_close(x, y, what=f"out at step {i}")
        same(got, want, before, i)
        assert not supports(Token(q, k, v), first, call), "the triton kernel knows no memory"


@pytest.mark.parametrize("heads", [2, 4], ids=["of KV heads", "of query heads"])
@pytest.mark.parametrize(("sinks", "softcap"), [(None, 0.0), (SINKS, 1.5)])
def test_step(heads: int, sinks: Tensor | None, softcap: float) -> None:
    """Against loops over the slots and the new token; the pure form gives the same."""
    rule, beside = builtin()["h2o"], memory(heads)
    state = state_under(rule, SEEN)
    q, k, v = qkv(2, 4, 2, 1, 16, keys=1)
    used = torch.cat([state.used(), torch.ones(2, 2, 1, dtype=torch.bool)], 2)
    keys, values = (torch.cat([held, new], 2) for held, new in ((state.k, k), (state.v, v)))
    expected, _ = loops(q, keys, values, lambda b, h, i, j: bool(used[b, h, j]), beside, sinks, softcap)
    pure = [x.clone() for x in state.tensors()]
    more = SEEN, SCALE, rule.encode(), sinks, softcap
    out = decode_attend(q, k, v, None, [*state.tensors()], *more, memory_k=beside[0], memory_v=beside[1])
    assert_close(out, expected.float(), what="out")
    again, *after = decode_step(q, k, v, None, pure, *more, *beside)
    assert_close(again, expected.float(), what="out of the pure form")
    assert (after[2].sort(-1).values == state.pos.sort(-1).values).all()


def test_rows_of_the_window() -> None:
    q, k, v = qkv(2, 4, 2, 11, 16)
    rule, beside = builtin()["snapkv"].replace(queries=4), memory(2)
    valid = torch.ones(2, 11, dtype=torch.bool)
    rows = window_rows(q, k, None, None, valid, SCALE, "causal", rule.encode(), memory_k=beside[0], memory_v=beside[1])
    _, probs = loops(q, k, v, lambda b, h, i, j: j <= i, beside, None, 0.0)
    assert_close(rows, probs[:, :, -4:].unflatten(1, (2, 2)).float(), what="rows")


def test_a_memory_that_does_not_fit_is_refused() -> None:
    q, k, v = qkv(2, 4, 2, 11, 16)
    rule = builtin()["h2o"].encode()
    for keys, values in ((memory(3)), (memory(2)[0], memory(2)[1][:, :, :2]), (memory(2, 3)), (memory(2)[0], None)):
        with pytest.raises(ValueError, match="memory"):
            prefill_attend(q, k, v, None, None, SCALE, "causal", rule, memory_k=keys, memory_v=values)
