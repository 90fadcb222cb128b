"""decode_attend without reading back, against the reference: the same tokens kept under all built-in policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, qkv
from models.states import arriving, builtin, same, state_under
from torch import Tensor

SEEN, SCALE = 240, 0.3
SINKS = torch.tensor([0.7, -1.5, 4.0, 9.0])


def sight(kind: str, position: int, heads: int = 4) -> dict[str, Any]:
    """What a step may be told of what it sees."""
    if kind == "words":
        return {"sees": "causal window=150"}
    if kind == "chunk":
        return {"sees": "causal chunk=64"}
    tokens = torch.ones(2, position + 3, dtype=torch.bool)
    tokens[1, 100:130] = False
    if kind == "tokens":
        return {"sees": "causal", "tokens": tokens}
    if kind == "pads":  # row 0 carries a pad at every other step
        tokens[0, SEEN + 1 :: 2] = False
        return {"sees": "causal", "tokens": tokens}
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(2, heads, 1, position + 1, generator=g)
    if kind == "bias":
        return {"mask": bias.masked_fill(~tokens[:, None, None, : position + 1], torch.finfo(torch.float32).min)}
    if kind == "heads":
        shown = (bias > -0.5) & tokens[:, None, None, : position + 1]
        shown[:, 0, :, -1] = True
        return {"mask": shown, "sees": "causal window=100"}
    return {}


def run(rule: Rule, kind: str, steps: int = 3, *, at: bool = False, softmax: Softmax | None = None) -> None:
    got = state_under(rule, SEEN)
    want, seen = got.clone(), SEEN
    for i in range(steps):
        position = SEEN + i
        q, k, v = qkv(2, 4, 2, 1, 16, keys=1, seed=i)
        token, told = Token(q, k, v, arriving(rule, seen)), sight(kind, position)
        mask = told.pop("mask", None)
        common: tuple[Any, ...] = (softmax or Softmax(SCALE), rule)
        here = {"at": torch.tensor([position], dtype=torch.int32)} if at else {}
        before = got.clone()
        x = decode_attend_device(token, got, Call.of_step(mask, 0 if at else position, *common, **told, **here))
        y = decode_attend_reference(token, want, Call.of_step(mask, position, *common, **told))
        assert_close(x, y, what=f"out at step {i}")
        same(got, want, before, i, rule[Merge].halves if rule[Merge].steps else ())
        seen += 1


@pytest.mark.parametrize("kind", ["none", "words", "chunk", "tokens", "pads", "bias", "heads"])
@pytest.mark.parametrize("name", list(builtin()))
def test_every_policy(name: str, kind: str) -> None:
    run(builtin()[name], kind, at=kind in ("words", "tokens", "heads"))


@pytest.mark.parametrize("name", ["h2o", "ada_snapkv", "cascading"])
def test_sinks_and_softcap(name: str) -> None:
    run(builtin()[name], "none", softmax=Softmax(SCALE, SINKS, 0.8))


@pytest.mark.parametrize("name", ["h2o", "snapkv", "ada_snapkv", "roco"])
def test_padding_between_tokens(name: str) -> None:
    """Windows of the newest and the oldest tokens that are held, where positions do not count them."""
    rule = builtin()[name].replace(sinks=3)
    got = state_under(rule, SEEN)
    got.cursor[..., 2] -= 20
    want = got.clone()
    for i in range(4):
        token = Token(*qkv(2, 4, 2, 1, 16, keys=1, seed=i))
        tokens = torch.ones(2, SEEN + i + 1, dtype=torch.bool)
        tokens[:, 50:70] = False
        call = Call.of_step(None, SEEN + i, Softmax(SCALE), rule, tokens=tokens)
        before = got.clone()
        decode_attend_device(token, got, call)
        decode_attend_reference(token, want, call)
        same(got, want, before, i)


@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "ada_snapkv"])
def test_values_in_the_keys(name: str) -> None:
    """Latent attention: the values are the first entries of the keys."""
    rule = builtin()[name]
    got = state_under(rule, SEEN, wide=0 or None)
    got = got.replaced(v=got.v[..., :0])
    want = got.clone()
    q, k, _ = qkv(2, 4, 2, 1, 16, keys=1)
    token, call = Token(q, k, k[..., :0]), Call.of_step(None, SEEN, Softmax(SCALE), rule, 8)
    before = got.clone()
    x, y = decode_attend_device(token, got, call), decode_attend_reference(token, want, call)
    assert_close(x, y, what="out")
    same(got, want, before, 0)


def test_what_was_taken_for_padding_is_not_shown() -> None:
    rule = builtin()["h2o"]
    state = state_under(rule, SEEN)
    state.cursor[..., 2] -= 5
    token = Token(*qkv(2, 4, 2, 1, 16, keys=1))
    for told in ({}, {"mask": torch.ones(1, 1, 1, SEEN + 1, dtype=torch.bool)}):
        call = Call.of_step(told.get("mask"), SEEN, Softmax(SCALE), rule)
        with pytest.raises(RuntimeError, match="taken for padding"):
            decode_attend_device(token, state, call)


def test_no_room() -> None:
    rule = builtin()["full"]
    state = state_under(rule, SEEN)
    state.cursor[..., 0] = state.slots
    token: Token = Token(*qkv(2, 4, 2, 1, 16, keys=1))
    with pytest.raises(RuntimeError, match="no room"):
        decode_attend_device(token, state, Call.of_step(None, SEEN, Softmax(SCALE), rule))


def test_order_within_heads() -> None:
    """Values of a head by rank, in heads of any width."""
    from kvpass.kernels.slots.reductions import Slots

    cursor = torch.tensor([[[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, -1]]], dtype=torch.int32)
    slots, x = Slots(cursor, 4), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    parts: list[Tensor] = list(x.flatten().split([6, 1, 5]))
    assert slots.width.flatten().tolist() == [6, 1, 5]  # type: ignore[union-attr]
    for rank in (0, 4):
        got = slots.ranked(x, torch.full((1, 3, 1), rank)).flatten().tolist()
        assert got == [sorted(part.tolist())[min(rank, len(part) - 1)] for part in parts]
    assert slots.amax(x).flatten().tolist() == [part.max() for part in parts]
    assert slots.sum(x > 0).flatten().tolist() == [int((part > 0).sum()) for part in parts]
