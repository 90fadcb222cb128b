"""prefill_attend, select_slots, compact_slots against the references and against plain loops: interpreted, or on a GPU.

Not collected by a plain `pytest`: test_triton_interpreter.py and tests/gpu run this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import (
    RULES,
    SCALE,
    SHAPES,
    SINKS,
    compact_slots_triton,
    masks,
    mostly,
    prefill_attend_triton,
    select_slots_triton,
)
from kvpass.kernels.compact_slots.reference import compact_slots_reference
from kvpass.kernels.prefill_attend.reference import prefill_attend_reference
from kvpass.kernels.select_slots.reference import select_slots_reference
from kvpass.kernels.slots.cursor import LIVE
from kvpass.kernels.slots.join_slots import join_slots
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, bits, qkv, random_state
from naive_attention import naive_prefill, naive_select
from torch import Tensor


def check_prefill(args: tuple, dtype: torch.dtype = torch.float32) -> None:
    got, want = prefill_attend_triton(*args), prefill_attend_reference(*args)
    assert torch.isfinite(got[0]).all(), "out has NaN or inf"
    for name, x, y in zip(("out", "stats", "valid"), got, want, strict=True):
        assert_close(x, y, dtype, stats=name == "stats", what=name)


@pytest.mark.parametrize(
    ("name", "mask"), [*((name, "causal") for name in RULES), *(mostly(name, "left", "h2o", "max") for name in RULES)]
)
def test_prefill_rules(name: str, mask: str) -> None:
    q, k, v = qkv(2, 6, 2, 45, 24)
    given = None if mask == "causal" else masks("left", 2, 6, 45, 45)
    check_prefill((q, k, v, None, given, SCALE, mask == "causal", RULES[name].encode()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_shapes(shape: str, causal: bool) -> None:
    batch, heads, kv_heads, queries, dim, wide = SHAPES[shape]
    q, k, v = qkv(batch, heads, kv_heads, queries, dim, value_dim=wide)
    check_prefill((q, k, v, None, None, SCALE, causal, RULES["roco"].encode()))


@pytest.mark.parametrize("mask", ["none", "right", "parted", "heads", "holes", "wide"])
def test_prefill_masks(mask: str) -> None:
    q, k, v = qkv(1, 4, 2, 70, 16)
    given = masks(mask, 1, 4, 70, 70)
    for rule in ("max", "snapkv"):
        check_prefill((q, k, v, None, given, SCALE, False, RULES[rule].encode()))


def test_prefill_window_of_valid_queries() -> None:
    """The last eight queries that are no padding, three of which are behind them."""
    q, k, v = qkv(1, 4, 2, 34, 16)
    args = (q, k, v, None, masks("parted", 1, 4, 34, 34), SCALE, False, RULES["snapkv"])
    got = prefill_attend_triton(*args[:-1], args[-1].encode())
    assert_close(got[1], naive_prefill(*args)[1], stats=True, what="stats")


@pytest.mark.parametrize("mask", ["none", "left", "heads", "holes"])
def test_prefill_naive(mask: str) -> None:
    q, k, v = qkv(2, 4, 2, 21, 16)
    args = (q, k, v, None, masks(mask, 2, 4, 21, 21), SCALE, mask == "none", RULES["roco"])
    got = prefill_attend_triton(*args[:-1], args[-1].encode())
    for name, x, y in zip(("out", "stats", "valid"), got, naive_prefill(*args), strict=True):
        assert_close(x, y, torch.float32, stats=name == "stats", what=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_half(dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 4, 2, 40, 32, dtype=dtype)
    check_prefill((q, k, v, None, masks("left", 1, 4, 40, 40), SCALE, False, RULES["h2o"].encode()), dtype)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", ["none", "left", "heads", "holes"])
def test_prefill_sinks_and_softcap(mask: str, softcap: float) -> None:
    q, k, v = qkv(2, 4, 2, 21, 16, value_dim=24)
    args = (q, k, v, None, masks(mask, 2, 4, 21, 21), 1.0, mask == "none")
    for rule, sinks in ((RULES["roco"], SINKS), (RULES["max"], SINKS.bfloat16()), (RULES["snapkv"], None)):
        got = prefill_attend_triton(*args, rule.encode(), sinks, softcap)
        want = naive_prefill(*args, rule, sinks, softcap)
        for name, x, y in zip(("out", "stats", "valid"), got, want, strict=True):
            assert_close(x, y, torch.float32, stats=name == "stats", what=name)


def test_prefill_strided() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 4, 2, 37, 16))
    assert not q.is_contiguous()
    mask = masks("holes", 2, 4, 74, 74)[:, :, ::2, ::2]
    check_prefill((q, k, v, None, mask, SCALE, False, RULES["roco"].encode()))


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        mostly(name, mask, *(("h2o", "snapkv", "roco") if mask == "holes" else ("snapkv",)))
        for mask in ("none", "left", "heads", "holes", "wide")
        for name in ("h2o", "snapkv", "roco")
    ],
)
def test_extend(name: str, mask: str) -> None:
    rule, queries, seen = RULES[name], 13, 40
    state = random_state(torch.tensor([[20, 5], [0, 12]]), 26, 24, rule, seen=seen, value_dim=20)
    q, k_new, v_new = qkv(2, 6, 2, queries, 24, value_dim=20, seed=4)
    k, v, pos, _ = join_slots(state.tensors(), k_new, v_new, seen, rule.encode())
    given = masks(mask, 2, 6, queries, seen + queries)
    check_prefill((q, k, v, pos, given, SCALE, False, rule.encode()))
    if mask in ("left", "holes"):
        check_prefill((q, k, v, pos, given, SCALE, False, rule.encode(), SINKS.repeat(2)[:6], 0.8))


def cursor_of(live: Tensor) -> Tensor:
    return torch.stack([live, live, live, torch.zeros_like(live)], -1).int()


@pytest.mark.parametrize("length", [1, 37, 129, 5000])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "protected"])
def test_select(length: int, kind: str) -> None:
    g = torch.Generator().manual_seed(length)
    score = torch.randn(2, 3, length, generator=g)
    if kind == "ties":
        score = (score * 2).round()  # also makes -0.0
    elif kind == "zeros":
        score = torch.where(score > 0, 0.0, -0.0)
    elif kind == "protected":
        score[score > 1] = float("inf")
        score[(score > 0.7) & (score <= 1)] = 3e38
    live = torch.tensor([[0, 1, length], [length // 2, length // 3, max(length - 1, 0)]])
    if kind == "protected":  # keys that are no candidates, and fewer slots than candidates
        score[(score < -1) & (torch.rand(score.shape, generator=g) > 0.5)] = float("-inf")
        live = torch.minimum(live, (score > float("-inf")).sum(-1))
    capacity = length + 3
    got = select_slots_triton(score, cursor_of(live), capacity)
    assert torch.equal(got, select_slots_reference(score, cursor_of(live), capacity))
    assert torch.equal(got, naive_select(score, live, capacity))


@pytest.mark.parametrize("given", [True, False], ids=["pos", "no pos"])
@pytest.mark.parametrize("name", ["streaming", "h2o", "roco"])
def test_compact(name: str, given: bool) -> None:
    rule, length, slots = RULES[name], 90, 70
    _, k, v = qkv(2, 4, 2, 1, 24, keys=length, value_dim=20)
    pos = (torch.arange(length, dtype=torch.int32) * 2).expand(2, 2, length).contiguous() if given else None
    stats = torch.rand(len(rule[Statistics].stats), 2, 2, length)
    cursor = cursor_of(torch.tensor([[65, 0], [1, 40]]))
    idx = select_slots_reference(torch.rand(2, 2, length), cursor, 66)
    got = random_state(torch.full((2, 2), 60), slots, 24, rule, seen=100, value_dim=20)
    want, before = got.clone(), got.clone()
    compact_slots_triton((k, v, pos, stats), idx, cursor, got.tensors())
    compact_slots_reference((k, v, pos, stats), idx, cursor, want)
    for part in ("k", "v", "pos", "stats", "cursor"):
        assert torch.equal(bits(getattr(got, part)), bits(getattr(want, part))), part
    beyond = torch.arange(slots) >= cursor[..., LIVE, None]
    assert torch.equal(bits(got.k[beyond]), bits(before.k[beyond]))
    assert torch.equal(bits(got.stats[:, beyond]), bits(before.stats[:, beyond]))
