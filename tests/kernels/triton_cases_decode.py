"""decode_attend, and the ops in a row, against the references and against plain loops: interpreted, or on a GPU.

Not collected by a plain `pytest`: test_triton_interpreter.py and tests/gpu run this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import (
    DEVICE,
    INTERPRETED,
    RULES,
    SCALE,
    SINKS,
    compact_slots_triton,
    decode_attend_reference,
    decode_attend_triton,
    masks,
    mostly,
    prefill_attend_triton,
    select_slots_triton,
    shown,
)
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import token_bounds
from kvpass.kernels.budget import Budget
from kvpass.kernels.compact_slots.reference import compact_slots_reference
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.triton import _splits
from kvpass.kernels.decode_attend.triton import decode_attend_triton as decode_attend_launched
from kvpass.kernels.decode_attend.triton_terms import understood
from kvpass.kernels.prefill_attend.reference import prefill_attend_reference
from kvpass.kernels.rank.criterion import Ranking
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots.reference import select_slots_reference
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, bits, empty_state, qkv, random_state
from kvpass.kernels.triton_shared.triton_launch import Target
from models.states import arriving, builtin, same, state_under
from oracle.naive_attention import naive_decode
from torch import Tensor


def run_decode(
    rule: Rule,
    state: State,
    mask: str,
    group: int,
    start: int,
    steps: int,
    dtype: torch.dtype = torch.float32,
    extras: tuple[Tensor | None, float] = (None, 0.0),
) -> None:
    """Several steps; after each, everything equals the reference and nothing unused was written."""
    batch, kv_heads, _, dim = state.k.shape
    got, want = state, state.clone()
    for i in range(steps):
        new = qkv(batch, group * kv_heads, kv_heads, 1, dim, value_dim=state.v.shape[3], seed=i, dtype=dtype)
        given = masks(mask, batch, group * kv_heads, 1, start + i + 1)
        before, args = got.clone(), (start + i, SCALE, rule.encode(), *extras)
        x = decode_attend_triton(*new, given, got.tensors(), *args)
        y = decode_attend_reference(*new, given, want.tensors(), *args)
        assert_close(x, y, dtype, what=f"out at step {i}")
        check_state(got, want, before, dtype, i)


def check_state(got: State, want: State, before: State, dtype: torch.dtype, step: int) -> None:
    assert_close(got.cursor, want.cursor, what=f"cursor at step {step}")
    assert_close(got.pos, want.pos, what=f"pos at step {step}")
    used = want.used()
    assert_close(got.stats[:, used], want.stats[:, used], dtype, stats=True, what=f"stats at step {step}")
    slot = torch.arange(used.shape[-1])
    kept = slot != before.cursor[..., FREE, None]
    written = slot <= before.cursor[..., LIVE, None]
    for name in ("k", "v"):
        x, y, z = (getattr(s, name) for s in (got, want, before))
        assert torch.equal(bits(x[used]), bits(y[used])), f"{name} at step {step}"
        assert torch.equal(bits(x[kept]), bits(z[kept])), f"{name}: a slot other than FREE was written at step {step}"
    assert torch.equal(bits(got.stats[:, ~written]), bits(before.stats[:, ~written])), "statistics beyond LIVE"


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        mostly(name, mask, *({"holes": (name,), "left": ("h2o", "snapkv")}.get(mask, ())))
        for mask in ("none", "left", "heads", "holes", "wide")
        for name in ("h2o", "snapkv", "roco", "streaming", "max", "full")
    ],
)
def test_decode_ragged(name: str, mask: str) -> None:
    rule = RULES[name]
    live = torch.full((2, 2), 50) if name == "full" else torch.tensor([[20, 13], [2, 19]])
    state = random_state(live, 56, 24, rule, seen=50, value_dim=20, holes=name != "full")
    run_decode(rule, state, mask, 3, 50, 4)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "roco", "streaming"])
def test_decode_parted(name: str) -> None:
    """Padding between a row's tokens: the windows are those of the newest and the oldest tokens that are held."""
    state = random_state(torch.tensor([[20, 13], [20, 19]]), 24, 16, RULES[name], seen=50)
    state.cursor[..., SEEN] -= 10
    run_decode(RULES[name], state, "parted", 2, 50, 5)


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("name", ["h2o", "max"])
def test_decode_groups(name: str, group: int) -> None:
    state = random_state(torch.tensor([[20, 7]]), 45, 80, RULES[name], seen=60)
    run_decode(RULES[name], state, "heads", group, 60, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_decode_half(dtype: torch.dtype, group: int) -> None:
    state = random_state(torch.tensor([[20, 20]]), 45, 32, RULES["h2o"], seen=60, dtype=dtype)
    run_decode(RULES["h2o"], state, "none", group, 60, 2, dtype)


@pytest.mark.parametrize("softcap", [0.0, 0.8])
@pytest.mark.parametrize("mask", ["none", "heads"])
@pytest.mark.parametrize("name", ["h2o", "max"])
def test_decode_sinks_and_softcap(name: str, mask: str, softcap: float) -> None:
    state = random_state(torch.tensor([[20, 13], [2, 19]]), 24, 24, RULES[name], seen=70, value_dim=20)
    run_decode(RULES[name], state, mask, 2, 70, 3, extras=(SINKS, softcap))
    run_decode(RULES[name], state, mask, 1, 73, 1, extras=(SINKS[:2].bfloat16(), softcap))
    run_decode(RULES[name], state, mask, 1, 74, 1, extras=(None, softcap))


@pytest.mark.parametrize("live", [5, 110])
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_decode_sinks_in_splits(mask: str, live: int) -> None:
    """Four splits, of which some may be empty: the sink counts once."""
    state = random_state(torch.tensor([[live]]), 140, 24, RULES["roco"], seen=300, value_dim=20)
    run_decode(RULES["roco"], state, mask, 4, 300, 2, extras=(SINKS, 0.8))
    assert _splits(1, 140, 16, Target("interpret", 0, 2)) == 4


@pytest.mark.parametrize(
    ("rows", "slots", "waves", "splits"),
    [
        *((8, 32768, 1, 32), (64, 8192, 1, 4), (256, 2048, 1, 1), (160, 8192, 1, 8), (96, 8192, 1, 8)),
        *((2, 32768, 1, 128), (1, 32768, 1, 256), (8, 200, 1, 1), (8, 32768, 4, 128), (8, 1024, 4, 8)),
    ],
)
def test_splits_fill_the_device(rows: int, slots: int, waves: int, splits: int) -> None:
    """132 cores with two places each: one wave of programs, or as many as make it even."""
    assert _splits(rows, slots, 64, Target("cuda", 90, 132), waves) == splits


@pytest.mark.parametrize("name", RULES)
def test_decode_from_nothing(name: str) -> None:
    """From an empty cache to six evictions; with heads="all" every head holds the same tokens."""
    rule = RULES[name].replace(recent=min(RULES[name][Protected].recent, 3))
    rule = rule.replace(slots=8) if rule[Budget].slots else rule.replace(floor=8)
    state = empty_state(1, 2, 17, 16, rule)
    run_decode(rule, state, "none", 2, 0, 14)
    if rule[Ranking].heads == "all":
        assert torch.equal(state.pos[:, 0], state.pos[:, 1])


@pytest.mark.parametrize("change", [{"when": "calls"}, {"every": 3}], ids=str)
def test_decode_that_waits(change: dict[str, Any]) -> None:
    """A step under such a rule appends and observes; nothing goes, though the budget is passed."""
    rule = RULES["h2o"].replace(**change)
    state = random_state(torch.tensor([[20, 20]]), 26, 16, rule, seen=60)
    run_decode(rule, state, "none", 2, 60, 5)
    assert state.cursor[..., LIVE].tolist() == [[25, 25]]


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming", "roco"])
def test_decode_naive(name: str) -> None:
    rule = RULES[name]
    state = random_state(torch.tensor([[20, 20], [16, 20]]), 22, 16, rule, seen=64)
    if rule[Ranking].heads == "all":  # one selection for all heads
        for t in (state.pos, state.cursor, state.stats):
            t.copy_(t.select(-2, 0).unsqueeze(-2).expand_as(t))
        for t in (state.k, state.v):
            t.copy_(t[:, :1].expand_as(t))
    got = state.clone()
    for i in range(3):
        new = qkv(2, 4, 2, 1, 16, seed=i)
        extras = (SINKS, 0.8) if i else (None, 0.0)
        out = decode_attend_triton(*new, None, got.tensors(), 64 + i, SCALE, rule.encode(), *extras)
        expected = naive_decode(*new, state, 64 + i, SCALE, rule, *extras)
        assert_close(out, expected, what="out")
        assert torch.equal(got.pos, state.pos)
        assert torch.equal(got.cursor, state.cursor)


@pytest.mark.parametrize("name", ["h2o", "roco"])
def test_decode_pads(name: str) -> None:
    """Rows whose own token is hidden in every head change nothing; one head that sees it is enough to append."""
    rule = RULES[name]
    state = random_state(torch.tensor([[20, 9], [20, 20], [4, 16]]), 24, 16, rule, seen=30)
    mask = torch.ones(3, 4, 1, 31, dtype=torch.bool)
    mask[0, :, :, 30] = False
    mask[1, 1:, :, 30] = False
    mask[2, :, :, :30] = False
    got, want = state.clone(), state.clone()
    args = (*qkv(3, 4, 2, 1, 16), mask)
    x = decode_attend_triton(*args, got.tensors(), 30, SCALE, rule.encode())
    y = decode_attend_reference(*args, want.tensors(), 30, SCALE, rule.encode())
    assert_close(x, y, what="out")
    check_state(got, want, state, torch.float32, 0)
    for name, a, b in zip(("k", "v", "pos", "stats", "cursor"), got.tensors(), state.tensors(), strict=True):
        first = (a[:, 0], b[:, 0]) if name == "stats" else (a[0], b[0])
        assert torch.equal(bits(first[0]), bits(first[1])), f"{name} of a pad row"


@pytest.mark.parametrize("name", ["h2o", "tova", "roco", "snapkv"])
def test_decode_ties(name: str) -> None:
    """Equal statistics everywhere: the newer goes, and equal deviations put the older in the scope."""
    rule = RULES[name]
    state = random_state(torch.tensor([[20, 20]]), 24, 16, rule, seen=70)
    if rule[Ranking].heads == "all":
        state.pos.copy_(state.pos[:, :1].expand_as(state.pos))
        state.cursor.copy_(state.cursor[:, :1].expand_as(state.cursor))
    for i, value in enumerate(rule[Statistics].stats):
        state.stats[i] = torch.where(state.used(), {"sum": 1.5, "sumsq": 2.0, "count": 3.0}[value], float("nan"))
    state.k[state.used()] = 0.25  # the same key everywhere keeps the sums equal
    args = (*qkv(1, 2, 2, 1, 16), None)
    want = state.clone()
    decode_attend_triton(*args, state.tensors(), 70, SCALE, rule.encode())
    decode_attend_reference(*args, want.tensors(), 70, SCALE, rule.encode())
    assert torch.equal(state.pos, want.pos)
    assert torch.equal(state.cursor, want.cursor)


def told(kind: str, position: int) -> list[Any]:
    """What a step sees, as the op's last arguments: words, tokens, bounds, the position on the device."""
    tokens = torch.ones(2, position + 2, dtype=torch.bool)
    at = torch.tensor([position], dtype=torch.int32)
    if kind == "window":
        return ["causal window=100", None, None, at]
    if kind == "chunk":
        return ["causal chunk=64", tokens[:1], None, None]
    if kind == "pads":  # row 0 carries a pad now and then, row 1 had some
        tokens[0, 161::2] = False
        tokens[1, 100:110] = False
        return ["causal window=140", tokens, None, at]
    tokens[0, :0] = False
    tokens[1, 90:120] = False
    return ["causal", tokens, None, at if kind == "holes at" else None]


def run_told(rule: Rule, kind: str, steps: int = 2, seen: int = 160) -> None:
    """Steps that are told what they see in words, tokens and bounds, against the reference."""
    got = state_under(rule, seen)
    want = got.clone()
    for i in range(steps):
        new, position = qkv(2, 4, 2, 1, 16, keys=1, seed=i), seen + i
        words = told(kind, position) if kind != "none" else ["", None, None, None]
        extras, before = (None, 0.0, arriving(rule, seen + i)), got.clone()
        on_host = 0 if words[3] is not None else position  # what the host says means nothing then
        x = decode_attend_triton(*new, None, got.tensors(), on_host, SCALE, rule.encode(), *extras, *words)
        y = decode_attend_reference(*new, None, want.tensors(), position, SCALE, rule.encode(), *extras, *words[:3])
        assert_close(x, y, what=f"out at step {i}")
        same(got, want, before, i)


APART = {
    *("ada_snapkv", "corm", "critical_ada", "criticalkv", "fastgen", "knorm", "pyramidkv, layer 1", "scissorhands"),
    *("trim_kv", "whitelist"),
}
"""Rules that ask for something that no other here does; the rest under `make wide`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in APART else pytest.mark.wide)
        for name, rule in builtin().items()
        if understood(rule)
    ],
)
def test_policy(name: str) -> None:
    """The rules of all built-in policies, but for that with rings."""
    run_told(builtin()[name], "none")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name == "h2o" or kind == "pads" else pytest.mark.wide)
        for name in ("h2o", "scissorhands", "ada_snapkv", "corm", "tova", "full")
        for kind in ("window", "chunk", "holes", "holes at", "pads")
    ],
)
def test_words(name: str, kind: str) -> None:
    run_told(builtin()[name], kind, 3 if kind == "pads" else 1)


def test_plain_left_padding_reads_no_tokens() -> None:
    """The row's bounds say that the tokens hide nothing: what they say is not looked up."""
    rule = builtin()["h2o"]
    state = state_under(rule, 160)
    new, tokens = qkv(2, 4, 2, 1, 16, keys=1), torch.ones(2, 161, dtype=torch.bool)
    state.cursor[1, :, FIRST], state.cursor[1, :, SEEN] = 30, 130
    state.pos[1] = torch.where(state.pos[1] < 30, state.pos[1], state.pos[1])
    held = state.pos[1] >= 0
    state.pos[1][held] = (state.pos[1][held] % 130) + 30
    tokens[1, :30] = False
    bounds = token_bounds(tokens, 160, 1)
    lies = torch.zeros_like(tokens)  # would hide everything
    outs = []
    for given in (tokens, lies):
        args = (state.clone().tensors(), 160, SCALE, rule.encode(), None, 0.0, None, "causal", given, bounds)
        outs.append(decode_attend_triton(*new, None, *args))
    assert torch.equal(*outs)


@pytest.mark.parametrize("words", [{}, {"k_as": "int4", "v_as": "int4", "rotated": True, "residual": 8}], ids=str)
def test_one_graph_for_all_steps(words: dict[str, Any]) -> None:
    """What a CUDA graph holds is replayed at other positions, with tokens that come: on a GPU captured for real, and
    nothing may wait for the device; in the interpreter called again, with a host that says nothing new.
    """
    rule, start = builtin()["h2o"].replace(**words), 160
    got = state_under(rule, start)
    want = got.clone()
    there = got.mapped(lambda _, x: x.to(DEVICE))
    at, tokens = torch.tensor([start], dtype=torch.int32), torch.ones(2, start + 9, dtype=torch.bool)
    tokens[1, 100:110] = False
    fixed = [x.to(DEVICE) for x in (*qkv(2, 4, 2, 1, 16, keys=1), at, tokens)]

    def step() -> Tensor:
        q, k, v, position, shown = fixed
        call = Call.of_step(None, 0, Softmax(SCALE), rule, 0, "causal window=120", shown, None, position)
        return decode_attend_launched(Token(q, k, v), there, call)

    replay = captured(step, there)
    for i in range(4):
        new = qkv(2, 4, 2, 1, 16, keys=1, seed=i)
        for held, x in zip(fixed, (*new, torch.tensor([start + i])), strict=False):
            held.copy_(x)
        x = replay()
        args = (want.tensors(), start + i, SCALE, rule.encode(), None, 0.0, None, "causal window=120", tokens)
        y = decode_attend_reference(*new, None, *args)
        assert_close(x.cpu(), y, what=f"out at step {i}")
        assert torch.equal(there.pos.cpu(), want.pos)
        assert torch.equal(there.cursor.cpu(), want.cursor)


def captured(step: Callable[[], Tensor], state: State) -> Callable[[], Tensor]:
    """The step as a graph's replay, or in the interpreter itself; the state is as before."""
    if INTERPRETED:
        return step
    before, side = state.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for held, old in zip(state.tensors(), before.tensors(), strict=True):
        held.copy_(old)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _compact_reference(keys: Any, idx: Tensor, cursor: Tensor, state: list[Tensor]) -> None:
    compact_slots_reference(keys, idx, cursor, State(state))


@pytest.mark.parametrize(
    ("name", "mask"), [*((name, "none") for name in RULES), *(mostly(name, "left", "h2o", "snapkv") for name in RULES)]
)
def test_pipeline(name: str, mask: str) -> None:
    """Prefill, selection and decoding in a row: the kept sets stay those of the reference."""
    rule, length = RULES[name], 40
    q, k, v = qkv(2, 4, 2, length, 16)
    given = masks(mask, 2, 4, length, length)
    seen = shown("causal" if given is None else "", length, mask=given)
    states = []
    for prefill, select, compact in (
        (prefill_attend_triton, select_slots_triton, compact_slots_triton),
        (prefill_attend_reference, select_slots_reference, _compact_reference),
    ):
        state = empty_state(2, 2, 24 if rule.evicts else length + 6, 16, rule)
        _, stats, valid = prefill(q, k, v, None, seen, Softmax(SCALE), rule)
        score, stats, cursor = score_slots(stats, None, None, valid, state.cursor, 0, rule.encode())
        idx = select(score, cursor, state.k.shape[2] - 1)
        compact((k, v, None, stats), idx, cursor, state.tensors())
        states.append(state)
    check_state(states[0], states[1], states[0], torch.float32, 0)
    run_decode(rule, states[0], mask, 2, length, 4)
