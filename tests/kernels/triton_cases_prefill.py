"""prefill_attend, select_slots, compact_slots against the references and against plain loops: interpreted, or on a GPU.

Not collected by a plain `pytest`: test_triton_interpreter.py and tests/gpu run this file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import (
    INTERPRETED,
    RULES,
    SCALE,
    SHAPES,
    SINKS,
    compact_slots_triton,
    masks,
    mostly,
    on_device,
    prefill_attend_triton,
    real,
    select_slots_triton,
    shown,
)
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Shown
from kvpass.kernels.choose import use
from kvpass.kernels.compact_slots.reference import compact_slots_reference
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.prefill_attend.providers.choose import use_provider
from kvpass.kernels.prefill_attend.reference import prefill_attend_reference
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots.reference import select_slots_reference
from kvpass.kernels.slots.cursor import LIVE
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, bits, causal_mask, qkv, random_state
from oracle.naive_attention import naive_prefill, naive_select
from torch import Tensor


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> None:
    assert torch.isfinite(got[0]).all(), "out has NaN or inf"
    for name, x, y in zip(("out", "stats", "valid"), got, want, strict=True):
        assert_close(x, y, dtype, stats=name == "stats", what=name)


def check_prefill(args: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> None:
    check(prefill_attend_triton(*args), prefill_attend_reference(*args), dtype)


def seen_by(mask: str, batch: int, heads: int, queries: int) -> Shown:
    """A mask of `masks` alone; causal for "none"."""
    return shown("causal" if mask == "none" else "", queries, mask=masks(mask, batch, heads, queries, queries))


@pytest.mark.parametrize(
    ("name", "mask"), [*((name, "none") for name in RULES), *(mostly(name, "left", "h2o", "max") for name in RULES)]
)
def test_prefill_rules(name: str, mask: str) -> None:
    check_prefill((*qkv(2, 6, 2, 45, 24), None, seen_by(mask, 2, 6, 45), Softmax(SCALE), RULES[name]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_shapes(shape: str, causal: bool) -> None:
    batch, heads, kv_heads, queries, dim, wide = SHAPES[shape]
    q, k, v = qkv(batch, heads, kv_heads, queries, dim, value_dim=wide)
    check_prefill((q, k, v, None, shown("causal" if causal else "", queries), Softmax(SCALE), RULES["roco"]))


WORDS = ("causal", "", "causal window=9", "causal chunk=16", "window=40", "chunk=23", "causal window=60 chunk=64")
TOKENS = ("all", "left", "right", "both", "holes", "none", "long")


def each(firsts: tuple[str, ...], seconds: tuple[str, ...], *, few: tuple[set[str], set[str]]) -> list[Any]:
    """Pairs, under `make wide` unless the first is one of few[0] or the second of few[1], but not both."""
    often = [
        (a, b) for a in firsts for b in seconds if (a in few[0]) != (b in few[1]) or (a, b) == (firsts[0], seconds[0])
    ]
    return [pytest.param(a, b, marks=[] if (a, b) in often else pytest.mark.wide) for a in firsts for b in seconds]


@pytest.mark.parametrize(("words", "tokens"), each(WORDS, TOKENS, few=({"causal"}, {"holes"})))
def test_prefill_words(words: str, tokens: str) -> None:
    """Long enough for blocks of queries and keys that are seen wholly, in part, and not at all."""
    q, k, v = qkv(2, 2, 1, 101, 16)
    seen = shown(words, 101, tokens=real(tokens, 2, 101))
    check_prefill((q, k, v, None, seen, Softmax(SCALE), RULES["roco"]))


@pytest.mark.parametrize("tokens", ["all", "left", "right", "both", "holes"])
def test_prefill_words_and_observed_window(tokens: str) -> None:
    q, k, v = qkv(2, 2, 1, 70, 16)
    seen = shown("causal", 70, tokens=real(tokens, 2, 70))
    check_prefill((q, k, v, None, seen, Softmax(SCALE), RULES["snapkv"]))


@pytest.mark.parametrize(
    ("words", "tokens"),
    each(
        ("causal", "", "causal window=9", "causal chunk=16"), ("all", "left", "right", "holes"), few=({""}, {"holes"})
    ),
)
def test_prefill_words_naive(words: str, tokens: str) -> None:
    q, k, v = qkv(2, 2, 1, 37, 16, value_dim=24)
    seen = shown(words, 37, tokens=real(tokens, 2, 37))
    softmax, rule = (Softmax(0.9, SINKS[:2], 1.5), "snapkv") if tokens == "holes" else (Softmax(SCALE), "max")
    args = (q, k, v, None, seen, softmax, RULES[rule])
    check(prefill_attend_triton(*args), naive_prefill(*args))


@pytest.mark.parametrize(
    ("words", "mask"),
    each(("causal", "causal window=9", "chunk=16"), ("heads", "holes", "wide", "right"), few=({"causal"}, {"holes"})),
)
@pytest.mark.parametrize("tokens", ["left", "holes"])
def test_prefill_words_and_mask(words: str, tokens: str, mask: str) -> None:
    """All of them hold."""
    q, k, v = qkv(2, 2, 1, 70, 16)
    seen = shown(words, 70, tokens=real(tokens, 2, 70), mask=masks(mask, 2, 2, 70, 70))
    check_prefill((q, k, v, None, seen, Softmax(SCALE), RULES["snapkv" if tokens == "holes" else "max"]))


def test_prefill_words_and_mask_naive() -> None:
    q, k, v = qkv(2, 4, 2, 33, 16)
    seen = shown("causal window=9", 33, tokens=real("holes", 2, 33), mask=masks("heads", 2, 4, 33, 33))
    args = (q, k, v, None, seen, Softmax(SCALE), RULES["roco"])
    check(prefill_attend_triton(*args), naive_prefill(*args))


@pytest.mark.parametrize("mask", ["none", "right", "parted", "heads", "holes", "wide"])
def test_prefill_masks(mask: str) -> None:
    q, k, v = qkv(1, 4, 2, 70, 16)
    for rule in ("max", "snapkv"):
        check_prefill((q, k, v, None, seen_by(mask, 1, 4, 70), Softmax(SCALE), RULES[rule]))


def test_prefill_mask_of_whole_tiles() -> None:
    """Where a mask shows all of a tile it is not read; where it adds a number, or hides one key, it is."""
    q, k, v = qkv(1, 4, 2, 200, 16)
    packed = torch.arange(200) // 130
    bias = torch.zeros(1, 4, 200, 200).masked_fill(packed[:, None] != packed, float("-inf"))
    bias[0, 1, 70:75, 3] = 2.5
    hole = causal_mask(200, 200)
    hole[0, 0, 150, 20] = False
    for mask in (bias, bias[:, :1], hole):
        check_prefill((q, k, v, None, shown("", 200, mask=mask), Softmax(SCALE), RULES["roco"]))


def test_prefill_window_of_valid_queries() -> None:
    """The last eight queries that are no padding, three of which are behind them."""
    args = (*qkv(1, 4, 2, 34, 16), None, seen_by("parted", 1, 4, 34), Softmax(SCALE), RULES["snapkv"])
    assert_close(prefill_attend_triton(*args)[1], naive_prefill(*args)[1], stats=True, what="stats")


@pytest.mark.parametrize("mask", ["none", "left", "heads", "holes"])
def test_prefill_naive(mask: str) -> None:
    args = (*qkv(2, 4, 2, 21, 16), None, seen_by(mask, 2, 4, 21), Softmax(SCALE), RULES["roco"])
    check(prefill_attend_triton(*args), naive_prefill(*args))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_half(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 2, 40, 32, dtype=dtype)
    for seen in (seen_by("left", 2, 4, 40), shown("causal", 40, tokens=real("left", 2, 40))):
        check_prefill((q, k, v, None, seen, Softmax(SCALE), RULES["h2o"]), dtype)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", ["none", "left", "heads", "holes"])
def test_prefill_sinks_and_softcap(mask: str, softcap: float) -> None:
    args = (*qkv(2, 4, 2, 21, 16, value_dim=24), None, seen_by(mask, 2, 4, 21))
    for rule, sinks in ((RULES["roco"], SINKS), (RULES["max"], SINKS.bfloat16()), (RULES["snapkv"], None)):
        all_args = (*args, Softmax(1.0, sinks, softcap), rule)
        check(prefill_attend_triton(*all_args), naive_prefill(*all_args))


def test_prefill_strided() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 4, 2, 37, 16))
    assert not q.is_contiguous()
    mask = masks("holes", 2, 4, 74, 74)[:, :, ::2, ::2]
    check_prefill((q, k, v, None, shown("", 37, mask=mask), Softmax(SCALE), RULES["roco"]))
    tokens = real("holes", 2, 74)[:, ::2]
    check_prefill((q, k, v, None, shown("causal", 37, tokens=tokens), Softmax(SCALE), RULES["roco"]))


def joined(rule: Rule, queries: int, seen: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the positions of a call after `seen` tokens, of which some are left."""
    state = random_state(torch.tensor([[20, 5], [0, 12]]), 26, 24, rule, seen=seen, value_dim=20)
    q, k_new, v_new = qkv(2, 6, 2, queries, 24, value_dim=20, seed=4)
    k, v, pos, _ = join_slots(state.tensors(), k_new, v_new, seen, rule.encode())
    return q, k, v, pos


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        mostly(name, mask, *(("h2o", "snapkv", "roco") if mask == "holes" else ("snapkv",)))
        for mask in ("none", "left", "heads", "holes", "wide")
        for name in ("h2o", "snapkv", "roco")
    ],
)
def test_extend(name: str, mask: str) -> None:
    rule = RULES[name]
    seen = shown("", 13, position=40, mask=masks(mask, 2, 6, 13, 53))
    args = (*joined(rule, 13, 40), seen)
    check_prefill((*args, Softmax(SCALE), rule))
    if mask in ("left", "holes"):
        check_prefill((*args, Softmax(SCALE, SINKS.repeat(2)[:6], 0.8), rule))


@pytest.mark.parametrize(
    ("words", "tokens"),
    each(
        ("causal", "", "causal window=17", "causal chunk=16", "causal corner"),
        ("all", "left", "right", "holes", "long"),
        few=({"causal"}, {"holes"}),
    ),
)
def test_extend_words(words: str, tokens: str) -> None:
    rule = RULES["snapkv" if tokens == "holes" else "roco"]
    args = (*joined(rule, 37, 40), shown(words, 37, position=40, tokens=real(tokens, 2, 77)), Softmax(SCALE), rule)
    check_prefill(args)


@pytest.mark.parametrize("words", ["causal", "causal window=17", "causal corner"])
def test_extend_words_naive(words: str) -> None:
    rule = RULES["roco"]
    args = (*joined(rule, 19, 40), shown(words, 19, position=40, tokens=real("holes", 2, 59)), Softmax(SCALE), rule)
    check(prefill_attend_triton(*args), naive_prefill(*args))


@pytest.mark.parametrize("mask", ["heads", "holes"])
def test_extend_words_and_mask(mask: str) -> None:
    rule = RULES["roco"]
    seen = shown("causal window=17", 13, position=40, tokens=real("holes", 2, 53), mask=masks(mask, 2, 6, 13, 53))
    check_prefill((*joined(rule, 13, 40), seen, Softmax(SCALE), rule))


VENDOR, VENDORS = ("cpu_flash", torch.float32) if INTERPRETED else ("flash", torch.bfloat16)
"""A provider that is not ours, and a dtype that it takes."""


@pytest.mark.parametrize(("words", "tokens"), each(("causal", ""), TOKENS, few=({"causal"}, {"holes"})))
def test_prefill_provider(words: str, tokens: str) -> None:
    """A vendor's attention and log-sum-exp, that know of no tokens and no sinks: what they do not hold is mended."""
    q, k, v = qkv(2, 2, 1, 70, 16, dtype=VENDORS)
    softmax = Softmax(SCALE, SINKS[:2] if tokens in ("all", "left") else None)
    with use_provider(VENDOR):
        check_prefill((q, k, v, None, shown(words, 70, tokens=real(tokens, 2, 70)), softmax, RULES["roco"]), VENDORS)


@pytest.mark.parametrize("tokens", ["left", "none", "holes"])
@pytest.mark.parametrize("name", ["triton", VENDOR])
def test_prefill_blind_queries(name: str, tokens: str) -> None:
    """The whole op: queries that see nothing get the mean of all values where the words say so, by whomever."""
    q, k, v = qkv(2, 2, 1, 37, 16, dtype=VENDORS)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        real_tokens, *rest = tensors
        return prefill_attend(*rest, None, None, SCALE, "causal mean", RULES["h2o"].encode(), tokens=real_tokens)

    given = real(tokens, 2, 37)
    with use("triton"), use_provider(name):
        got = on_device(run)(given, q, k, v)
    with use("reference"):
        want = run(given, q, k, v)
    check(got, want, VENDORS)
    if tokens != "holes":
        row = int(tokens == "left")
        assert_close(got[0][row, 0, 0], v[row, 0].float().mean(0), VENDORS, what="a blind query's output")


def test_prefill_provider_that_does_not_fit() -> None:
    q, k, v = qkv(1, 2, 1, 20, 16)
    with use_provider(VENDOR), pytest.raises(ValueError, match=f"{VENDOR} .*does not support"):
        prefill_attend_triton(q, k, v, None, shown("causal window=4", 20), Softmax(SCALE), RULES["h2o"])


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
