"""decode_attend over slots that hold codes, against the reference: interpreted, or on a GPU.

Not collected by a plain `pytest`: test_triton_interpreter.py and tests/gpu run this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import INTERPRETED, SCALE, SINKS, decode_attend_reference, decode_attend_triton
from kvpass.kernels import choose
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.codecs.registry import CODECS
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.triton import decode_attend_triton as decode_attend_launched
from kvpass.kernels.decode_attend.triton import supports
from kvpass.kernels.decode_attend.triton_stored import READ, readable
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN as TOKENS_SEEN
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import TOLERANCES, assert_close, qkv
from models.states import arriving, builtin, held, same, state_under
from oracle.ops import Site
from test_coded_slots import INT4, Chat, exactly
from test_coded_slots import STORES as HELD
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

SEEN = 100
STORES: dict[str, dict[str, Any]] = {
    "int8": {"k_as": "int8", "v_as": "int8", "residual": 8, "whole_sinks": 3},
    "int4 turned": {"k_as": "int4", "v_as": "int4", "rotated": True, "scale_group": 16, "residual": 8},
    "int2 turned, no copies": {"k_as": "int2", "v_as": "int2", "rotated": True, "scale_group": 5},
    "int3": {"k_as": "int3", "v_as": "int3", "scale_group": 8, "whole_sinks": 4},
    "keys alone": {"k_as": "int4", "rotated": True, "scale_group": 16, "residual": 6},
    "values alone": {"v_as": "int2", "rotated": True, "scale_group": 16, "whole_sinks": 2},
    "two kinds": {"k_as": "int8_symmetric", "v_as": "int4", "scale_group": 4, "residual": 9, "whole_sinks": 4},
    "fp8": {"k_as": "fp8_e4m3", "v_as": "fp8_e5m2", "rotated": True, "residual": 3, "whole_sinks": 1},
    "symmetric": {"k_as": "int4_symmetric", "v_as": "int8_symmetric", "rotated": True, "residual": 1},
    "normal levels": {"k_as": "turbo3", "v_as": "turbo2", "rotated": True, "residual": 3},
    "more normal levels": {"k_as": "turbo4", "v_as": "turbo3", "scale_group": 12},
    "more whole than held": {"k_as": "int4", "v_as": "int4", "scale_group": 16, "residual": 60, "whole_sinks": 2},
}


def told(kind: str, position: int) -> list[Any]:
    """What a step sees: words, tokens, bounds, position on the device; or a mask in their place."""
    tokens = torch.ones(2, position + 1, dtype=torch.bool)
    if kind == "none":
        return ["", None, None, None]
    if kind == "window at":
        return ["causal window=60", tokens[:1], None, torch.tensor([position], dtype=torch.int32)]
    tokens[1, 60:70] = False
    if kind == "pads":  # row 0 carries a pad at every other step
        tokens[0, SEEN + 1 :: 2] = False
        return ["causal", tokens, None, None]
    assert kind == "bias"
    return ["", None, None, None]


def mask_of(kind: str, position: int, heads: int) -> Tensor | None:
    if kind != "bias":
        return None
    noise = torch.randn(2, heads, 1, position + 1, generator=torch.Generator().manual_seed(position))
    noise[1, ..., 60:70] = torch.finfo(torch.float32).min
    return noise


def run(
    rule: Rule, kind: str, steps: int = 2, *, group: int = 2, dim: int = 16, wide: int | None = None,
    dtype: torch.dtype = torch.float32, extras: tuple[Tensor | None, float] = (None, 0.0), state: State | None = None,
) -> State:  # fmt: skip
    """Steps; after each the output, positions, statistics, codes and whole copies are those of the reference."""
    got = state_under(rule, SEEN, dim, wide=wide) if state is None else state
    got = got.mapped(lambda field, x: x.to(dtype) if field.dtype is None else x)
    want = got.clone()
    for i in range(steps):
        new = qkv(2, 2 * group, 2, 1, dim, keys=1, value_dim=wide, dtype=dtype, seed=i)
        position, before = SEEN + i, got.clone()
        words, mask = told(kind, position), mask_of(kind, position, 2 * group)
        token, call = Token(*new), Call.of_step(mask, position, Softmax(SCALE), rule, 0, *words)
        assert supports(token, got, call)
        brought, on_host = arriving(rule, position), 0 if words[3] is not None else position
        x = decode_attend_triton(*new, mask, got.tensors(), on_host, SCALE, rule.encode(), *extras, brought, *words)
        args = (want.tensors(), position, SCALE, rule.encode(), *extras, brought, *words[:3])
        y = decode_attend_reference(*new, mask, *args)
        assert_close(x, y, dtype, what=f"out at step {i}")
        if dtype == torch.float32:
            same(got, want, before, i)
    return got


@pytest.mark.parametrize("kind", ["pads", pytest.param("none", marks=pytest.mark.wide)])
@pytest.mark.parametrize("store", STORES)
def test_store(store: str, kind: str) -> None:
    """Every way to hold, with evictions: all slots seen, or rows with padding between their tokens and in a step."""
    run(builtin()["h2o"].replace(**STORES[store]), kind, 2)


@pytest.mark.parametrize(
    "name",
    [
        *("full", "roco", "ada_snapkv", "tova"),
        *(pytest.param(name, marks=pytest.mark.wide) for name in ("snapkv", "streaming_llm", "nacl", "criticalkv")),
    ],
)
def test_policy(name: str) -> None:
    """Every way to score, and heads of unequal lengths."""
    rule = builtin()[name].replace(**STORES["int4 turned"])
    run(rule, "bias" if name in ("roco", "ada_snapkv") else "window at")


@pytest.mark.parametrize("store", ["int8", "int2 turned, no copies", "fp8"])
@pytest.mark.parametrize("name", ["ada_snapkv", pytest.param("h2o", marks=pytest.mark.wide)])
def test_masks(name: str, store: str) -> None:
    run(builtin()[name].replace(**STORES[store]), "bias", 1)


@pytest.mark.parametrize(
    ("dim", "wide", "scale_group"),
    [
        *((80, 80, 64), (24, 40, 7), (5, 3, 64)),
        *(pytest.param(*each, marks=pytest.mark.wide) for each in ((128, 64, 64), (80, 80, 7), (5, 3, 2))),
    ],
)
def test_widths(dim: int, wide: int, scale_group: int) -> None:
    """Heads of any width, groups that do not divide it; one query head or many."""
    for store, group in (("int3", 1), ("two kinds", 3), ("int4 turned", 1)):
        rule = builtin()["h2o"].replace(**STORES[store] | {"scale_group": scale_group})
        run(rule, "none", 1, group=group, dim=dim, wide=wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", ["int8", "int4 turned", "fp8"])
def test_half(store: str, dtype: torch.dtype) -> None:
    """The numbers that codes stand for are rounded to the model's dtype, as dense slots are."""
    for group in (1, 4):
        run(builtin()["full"].replace(**STORES[store]), "none", 1, group=group, dtype=dtype)


def test_sinks_and_softcap() -> None:
    run(builtin()["h2o"].replace(**STORES["int4 turned"]), "none", 2, extras=(SINKS, 0.8))


@pytest.mark.parametrize("residual", [0, 2])
def test_rows_that_begin_with_steps(residual: int) -> None:
    """The first tokens of a row are whole, one of which begins late; those after them are read as their codes say."""
    words = {"k_as": "int2", "v_as": "int2", "rotated": True, "residual": residual, "whole_sinks": 2}
    rule = builtin()["full"].replace(**words)
    got = State.empty(rule, torch.empty(0), B=2, H=2, C=8, D=16, V=16)
    want = got.clone()
    for position in range(6):
        new, tokens = qkv(2, 4, 2, 1, 16, keys=1, seed=position), torch.ones(2, position + 1, dtype=torch.bool)
        tokens[1, :2] = False
        args = (position, SCALE, rule.encode(), None, 0.0, None, "causal", tokens)
        x = decode_attend_triton(*new, None, got.tensors(), *args)
        y = decode_attend_reference(*new, None, want.tensors(), *args)
        rows = slice(0, 2 if position >= 2 else 1)  # what padding gets means nothing
        assert_close(x[rows], y[rows], what=f"out at step {position}")
        assert torch.equal(got[WHOLE_AT], want[WHOLE_AT])


class InTriton(Site):
    """A layer whose steps run in Triton, its other calls as on this device."""

    def one(self, *args: Any) -> Tensor:
        with choose.use("triton"):
            return super().one(*args)


@pytest.mark.skipif(not INTERPRETED, reason="the simulation's tensors are the CPU's")
@pytest.mark.parametrize("policy", ["h2o", pytest.param("ada_snapkv", marks=pytest.mark.wide)])
def test_against_a_simulation(policy: str) -> None:
    """A padded prompt, steps, a second turn, a step: as a simulation that holds every token says, in float64."""
    chat = Chat(policy, 16 if policy == "h2o" else 40, INT4 if policy == "h2o" else HELD["fp8"], site=InTriton)
    chat.converse([(44, 3), (3, 1)], [44, 31])
    exactly(chat)


def test_a_wrong_number_shows() -> None:
    """Each part of what is held changes the output by more than the comparison lets through."""
    rule = builtin()["full"].replace(**STORES["two kinds"])
    state, new = state_under(rule, SEEN), qkv(2, 4, 2, 1, 16, keys=1)
    right = decode_attend_triton(*new, None, state.clone().tensors(), SEEN, SCALE, rule.encode())
    for name in ("k_codes", "k_scale", "v_codes", "v_scale", "v_low", WHOLE_AT, "k", "v"):
        wrong = state.clone()
        wrong[name].copy_(wrong[name].flip(-1))
        out = decode_attend_triton(*new, None, wrong.tensors(), SEEN, SCALE, rule.encode())
        assert (out - right).abs().max() > 10 * TOLERANCES[torch.float32][0], name


def test_every_codec_is_read_or_refused() -> None:
    """A codec or a word that nobody named is left to torch."""
    assert {"int8", "int4", "int3", "int2", "fp8_e4m3"} <= READ.keys()
    for name in CODECS:
        assert readable(Storage(k_as=name)) == (name in READ)


@contextmanager
def reads() -> Iterator[list[Tensor]]:
    """What the interpreter loads within the block: int64 addresses of bytes, each once a load."""
    found: list[Tensor] = []
    load = InterpreterBuilder.create_masked_load

    def counted(self: InterpreterBuilder, ptrs: Any, mask: Any, *args: Any) -> Any:
        out = load(self, ptrs, mask, *args)
        address = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data].astype(np.int64).reshape(-1, 1)
        found.append(torch.from_numpy(np.unique(address + np.arange(out.data.dtype.itemsize))))
        return out

    InterpreterBuilder.create_masked_load = counted
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load = load


def bytes_read(words: dict[str, Any], dtype: torch.dtype, tokens: int = 300, dim: int = 128) -> int:
    """Distinct bytes of keys, values, codes and scales that the kernels of a step load."""
    rule = builtin()["full"].replace(**words)
    state = state_under(rule, tokens, dim, 1, 1)
    state = state.mapped(lambda field, x: x.to(dtype) if field.dtype is None else x)
    token = Token(*qkv(1, 2, 1, 1, dim, keys=1, dtype=dtype))
    with reads() as found:
        decode_attend_launched(token, state, Call.of_step(None, tokens, Softmax(SCALE), rule))
    address, total = torch.cat(found).unique(), 0
    for field in state.fields:
        if field.entries:
            x = state[field.name]
            total += int(((address >= x.data_ptr()) & (address < x.data_ptr() + x.nbytes)).sum())
    return total


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what is loaded")
def test_bytes_that_a_step_reads() -> None:
    """Codes and scales of each token, each byte once from memory, and nothing else of keys and values: at four bits
    about a quarter of what float16 needs, an eighth of float32.
    """
    tokens, dim, group = 300, 128, 64
    dense = {t: bytes_read({}, t, tokens, dim) for t in (torch.float16, torch.float32)}
    assert dense == {t: tokens * 2 * dim * t.itemsize for t in dense}
    for name, bits, limit in (("int8", 8, 0.54), ("int4", 4, 0.29), ("int2", 2, 0.16), ("fp8_e4m3", 8, 0.52)):
        words = {"k_as": name, "v_as": name, "scale_group": group}
        scales = (2 if name == "fp8_e4m3" else 4) * dim // group
        for dtype, of in ((torch.float16, 1.0), (torch.float32, 0.5)):
            got = bytes_read(words, dtype, tokens, dim)
            assert got == tokens * 2 * (dim * bits // 8 + scales)
            assert got < limit * of * dense[dtype]
            print(f"{name}: {got} bytes, {got / dense[dtype]:.3f} of {dtype}")
    copies = bytes_read({"k_as": "int4", "v_as": "int4", "residual": 16, "whole_sinks": 4}, torch.float16, tokens, dim)
    plain = bytes_read({"k_as": "int4", "v_as": "int4"}, torch.float16, tokens, dim)
    assert copies == plain + (15 + 4) * 2 * dim * 2  # the token's own copy is not read: it is in registers


def test_left_behind_copies() -> None:
    """Places still name tokens that a head has evicted, and rows hold copies of other tokens than their neighbours."""
    rule = builtin()["h2o"].replace(**STORES["more whole than held"])
    state = state_under(rule, SEEN)
    state[WHOLE_AT][1] = torch.where(torch.arange(62) % 3 == 0, -1, state[WHOLE_AT][1])
    assert not torch.isin(state[WHOLE_AT][0, 0], state.pos[0, 0][held(state)[0, 0]]).all()
    state.cursor[1, :, TOKENS_SEEN] -= 10
    run(rule, "pads", 3, state=state)
