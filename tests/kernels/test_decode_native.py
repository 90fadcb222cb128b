"""decode_attend in C++ against the reference: the same tokens kept under all built-in policies, and who runs what."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpass.kernels import choose
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.decode_attend import decode_attend, native
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.native import library
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import LIVE
from kvpass.kernels.testing import assert_close, qkv, random_state
from models.states import arriving, builtin, same, state_under

SEEN, SCALE = 240, 0.3
H2O = Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, slots=100)
ALL = Rule(stats=("sum", "sumsq", "count"), queries=-1, group="max", decode="add", score="mean", slots=100)

if platform.system() != "Linux":
    pytest.skip("kernels of our own are compiled on Linux only", allow_module_level=True)
assert library.function("step", GROUP=2, DIM=16, WIDE=16, KIND=0) is not None, "no C++ compiler: install g++"


def sight(kind: str, position: int) -> dict[str, Any]:
    """What a step may be told of what it sees."""
    tokens = torch.ones(2, position + 3, dtype=torch.bool)
    tokens[1, 100:130] = False
    if kind == "words":
        return {"sees": "causal window=150", "tokens": tokens}
    if kind == "mask":
        return {"mask": tokens[:, None, None, : position + 1]}
    return {}


@pytest.mark.parametrize("kind", ["none", "words", "mask"])
@pytest.mark.parametrize("name", list(builtin()))
def test_every_policy(name: str, kind: str) -> None:
    rule = builtin()[name]
    got = state_under(rule, SEEN)
    want = got.clone()
    for i in range(3):
        position = SEEN + i
        q, k, v = qkv(2, 4, 2, 1, 16, keys=1, seed=i)
        told, before = sight(kind, position), got.clone()
        mask, arrive = told.pop("mask", None), arriving(rule, position)
        outs = []
        for how, state in (("native", got), ("reference", want)):
            with choose.use(how):
                args = (mask, state.tensors(), position, SCALE, rule.encode())
                outs.append(decode_attend(q, k, v, *args, arrive=arrive, **told))
        assert_close(*outs, what=f"out at step {i}")
        same(got, want, before, i, rule[Merge].halves if rule[Merge].steps else ())


@pytest.mark.parametrize("name", ["h2o", "snapkv", "ada_snapkv", "streaming_llm", "pyramidkv", "tova", "scissorhands"])
def test_which_run_in_it(name: str) -> None:
    """What is measured (docs/design/0023) is not the reference."""
    rule = builtin()[name]
    state, (q, k, v) = state_under(rule, SEEN), qkv(2, 4, 2, 1, 16, keys=1)
    out = native.decode_attend_native(
        q, k, v, state.tensors(), SEEN, rule.encode(), Softmax(SCALE), None, "", None, None
    )
    assert out is not None


@pytest.mark.parametrize(
    ("group", "dim", "wide", "dtype"),
    [(1, 24, 16, torch.float32), (5, 80, 80, torch.bfloat16), (16, 64, 40, torch.float16)],
)
def test_shapes_and_dtypes(group: int, dim: int, wide: int, dtype: torch.dtype) -> None:
    """Entries that fill no vector, many query heads, half precision; softcap and sinks; several pieces of a head."""
    live = torch.tensor([[70, 131], [1, 64]])
    g = torch.Generator().manual_seed(2)
    sinks = torch.randn(2 * group, generator=g)
    for rule, extras in ((H2O, {}), (ALL, {"sinks": sinks, "softcap": 1.5})):
        got = random_state(live, 140, dim, rule, seen=200, value_dim=wide, dtype=dtype)
        want = got.clone()
        q, k, v = qkv(2, 2 * group, 2, 1, dim, keys=1, value_dim=wide, dtype=dtype, seed=3)
        outs = []
        for how, state in (("native", got), ("reference", want)):
            with choose.use(how):
                outs.append(decode_attend(q, k, v, None, state.tensors(), 200, SCALE, rule.encode(), **extras))
        assert_close(*outs)
        assert outs[0].dtype == dtype
        assert torch.equal(got.cursor, want.cursor)
        assert torch.equal(got.pos, want.pos)
        assert_close(got.stats.nan_to_num(-1.0), want.stats.nan_to_num(-1.0), dtype, stats=True)


def test_the_same_with_more_threads() -> None:
    """Pieces are cut and joined alike, whoever does them."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = random_state(torch.tensor([[300, 17], [150, 90]]), 320, 16, ALL, seen=400)
            q, k, v = qkv(2, 4, 2, 1, 16, keys=1)
            found.append([decode_attend(q, k, v, None, state.tensors(), 400, SCALE, ALL.encode()), *state.tensors()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def test_tensors_that_do_not_fit_change_nothing() -> None:
    """Pointers are taken of what was checked only; the reference says what is wrong."""
    state = random_state(torch.tensor([[7]]), 20, 16, H2O, seen=60)
    q, k, v = qkv(1, 2, 1, 1, 16, keys=1)
    narrow = state.replaced(pos=state.pos[..., :10].clone())
    with pytest.raises(ValueError, match="slots of pos"):
        decode_attend(q, k, v, None, narrow.tensors(), 60, SCALE, H2O.encode())
    with pytest.raises(ValueError, match="do not fit"):
        decode_attend(q[..., :8], k, v, None, state.tensors(), 60, SCALE, H2O.encode())
    full = random_state(torch.tensor([[19]]), 20, 16, H2O, seen=60)
    full.cursor[..., LIVE] = 20
    before = full.clone()
    with pytest.raises(ValueError, match="no room"):
        decode_attend(q, k, v, None, full.tensors(), 60, SCALE, H2O.encode())
    assert torch.equal(full.pos, before.pos)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The reference runs, and it is said once."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_lanes", {})
    for cached in (library.function, library._compiler, library._machine, library._say):
        cached.cache_clear()
    try:
        for _ in range(2):
            state = random_state(torch.tensor([[7]]), 20, 16, H2O, seen=60)
            decode_attend(*qkv(1, 2, 1, 1, 16, keys=1), None, state.tensors(), 60, SCALE, H2O.encode())
            assert int(state.cursor[0, 0, LIVE]) == 8
        assert sum("no C++ compiler" in record.message for record in caplog.records) == 1
    finally:
        for cached in (library.function, library._compiler, library._machine, library._say):
            cached.cache_clear()
