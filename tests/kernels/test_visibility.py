"""Words, tokens and bounds in the place of a mask: each op gives what it gives with the mask that they stand for."""

import itertools

import pytest
import torch
from kvpass.kernels.attention.visibility import Sees, Shown, as_mask, token_bounds
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.errors import MaskError
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.prefill_attend import reference as prefill_reference
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, qkv, random_state

WORDS = [
    "",
    "causal",
    "causal window=5",
    "causal window=40",
    "causal chunk=8",
    "chunk=8",
    "window=7",
    "causal window=6 chunk=16",
]
RULE = Rule(stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="sum", num=1, den=1)


def rows(kind: str, total: int) -> torch.Tensor | None:
    """Which of `total` columns hold a token, bool [3, total]."""
    real = torch.ones(3, total, dtype=torch.bool)
    if kind == "none":
        return None
    if "left" in kind:
        real[1, :3] = real[2, :9] = False
    if "right" in kind:
        real[0, -4:] = False
    if "holes" in kind:
        real[1, 5:7] = real[2, 11] = False
    if kind == "one row":
        return real[:1].index_fill(1, torch.tensor([0, 1]), False)
    if kind == "empty":
        real[2] = False
    return real


KINDS = ["none", "left", "right", "left right", "left holes", "one row", "empty"]


def loops(words: str, real: torch.Tensor | None, batch: int, queries: int, keys: int, start: int) -> torch.Tensor:
    """The mask [B, 1, S, T], element by element, from what docs say of the words."""
    sees = Sees.parse(words)
    mask = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for b, i, j in itertools.product(range(batch), range(queries), range(keys)):
        p = start + i
        shown = True
        if sees.causal:
            shown = shown and j <= (i if sees.corner else p)
        if sees.window:
            shown = shown and j > p - sees.window
        if sees.chunk:
            shown = shown and j // sees.chunk == p // sees.chunk
        if real is not None:
            shown = shown and bool(real[b % len(real), j])
        mask[b, 0, i, j] = shown
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", WORDS)
def test_prefill(words, kind, monkeypatch):
    monkeypatch.setattr(prefill_reference, "BLOCK", 7)
    q, k, v = qkv(3, 4, 2, 23, 16)
    real = rows(kind, 23)
    mask = loops(words, real, 3, 23, 23, 0)
    assert torch.equal(as_mask(Shown(Sees.parse(words), 23, tokens=real), 23).expand_as(mask), mask)
    got = prefill_attend(q, k, v, None, None, 0.25, words, RULE.encode(), tokens=real)
    want = prefill_attend(q, k, v, None, mask, 0.25, "", RULE.encode())
    for name, one, other in zip(("out", "stats"), got, want, strict=False):
        assert_close(one, other, stats=name == "stats", what=name)
    valid = torch.ones(3, 23, dtype=torch.bool) if real is None else real.expand(3, -1)
    assert torch.equal(got[2], valid)


@pytest.mark.parametrize("kind", ["left", "right", "left holes", "one row"])
@pytest.mark.parametrize("words", ["", "causal", "causal window=5"])
@pytest.mark.parametrize("numbers", [False, True])
def test_masks_by_key_beside_words(words, kind, numbers):
    """As models write padding: beside a causal mask, one that is the same for all queries."""
    q, k, v = qkv(3, 4, 2, 23, 16)
    real = rows(kind, 23)
    by_key, whole = real[:, None, None], loops(words, real, 3, 23, 23, 0)
    if numbers:
        by_key, whole = (torch.zeros(x.shape).masked_fill(~x, -1e9) for x in (by_key, whole))
    got = prefill_attend(q, k, v, None, by_key, 0.25, words, RULE.encode())
    want = prefill_attend(q, k, v, None, whole, 0.25, "", RULE.encode())
    for name, one, other in zip(("out", "stats", "valid"), got, want, strict=True):
        assert_close(one, other, stats=name == "stats", what=name)
    state = random_state(torch.tensor([[9, 12], [8, 8], [5, 3]]), 24, 16, RULE, seen=22)
    one, other = state.clone(), state.clone()
    token, args = [x[:, :, -1:].contiguous() for x in (q, k, v)], (22, 0.25, RULE.encode())
    found = decode_attend(*token, by_key, one.tensors(), *args, sees=words)
    assert_close(found, decode_attend(*token, whole[:, :, -1:], other.tensors(), *args))
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("words", ["causal", "causal window=5", ""])
def test_blind_queries_get_the_mean_if_numbers_hide(words):
    q, k, v = qkv(3, 4, 2, 23, 16)
    real = rows("left right", 23)
    mask = loops(words, real, 3, 23, 23, 0)
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = prefill_attend(q, k, v, None, None, 0.25, f"{words} mean", RULE.encode(), tokens=real)[0]
    want = prefill_attend(q, k, v, None, numbers, 0.25, "", RULE.encode())[0]
    assert_close(got, want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
@pytest.mark.parametrize("words", [*WORDS, "causal corner"])
def test_extend(words, kind):
    """Past slots in any order, then seven tokens."""
    start, new = 20, 7
    real = rows(kind, start + new)
    state = random_state(torch.tensor([[9, 12], [8, 8], [5, 3]]), 24, 16, RULE, seen=start)
    q, k, v = qkv(3, 4, 2, new, 16)
    keys, values, pos, _ = join_slots(state.tensors(), k, v, start, RULE.encode())
    mask = loops(words, real, 3, new, start + new, start)
    got = prefill_attend(q, keys, values, pos, None, 0.25, words, RULE.encode(), tokens=real, position=start)
    want = prefill_attend(q, keys, values, pos, mask, 0.25, "", RULE.encode(), position=start)
    assert_close(got[0], want[0])
    if words == "causal corner":  # a model that hides new tokens from their own queries: they are tokens all the same
        return
    assert_close(got[1], want[1], stats=True)
    whole = torch.ones(3, new, dtype=torch.bool) if real is None else real[:, start:].expand(3, -1)
    assert torch.equal(got[2], whole)
    window = Rule(stats=("sum",), queries=4, scorer="snapkv", reads=("rows",))
    both = [
        window_rows(q, keys, pos, None, whole, 0.25, words, window.encode(), tokens=real, position=start),
        window_rows(q, keys, pos, mask, whole, 0.25, "", window.encode()),
    ]
    assert_close(*both)


@pytest.mark.parametrize("kind", ["none", "left", "holes", "one row", "right"])
@pytest.mark.parametrize("words", ["causal", "causal window=6", "causal chunk=8", ""])
def test_decode(words, kind):
    """What was hidden when it came has no slot; a later step may hide more."""
    position, total = 20, 21
    real = rows(kind, total)
    state = random_state(torch.tensor([[9, 12], [8, 8], [5, 3]]), 24, 16, RULE, seen=position)
    q, k, v = qkv(3, 4, 2, 1, 16)
    mask = loops(words, real, 3, 1, total, position)
    one, other = state.clone(), state.clone()
    args = (position, 0.25, RULE.encode())
    got = decode_attend(q, k, v, None, one.tensors(), *args, sees=words, tokens=real)
    want = decode_attend(q, k, v, mask, other.tensors(), *args)
    assert_close(got, want)
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_what_was_padding_stays_hidden():
    state = random_state(torch.tensor([[4]]), 8, 16, RULE, seen=5)
    q, k, v = qkv(1, 2, 1, 1, 16)
    with pytest.raises(MaskError, match="taken for padding"):
        decode_attend(q, k, v, None, state.tensors(), 6, 0.25, RULE.encode(), sees="causal")
    tokens = torch.ones(1, 7, dtype=torch.bool)
    with pytest.raises(MaskError, match="taken for padding"):
        decode_attend(q, k, v, None, state.tensors(), 6, 0.25, RULE.encode(), sees="causal", tokens=tokens)
    tokens[0, 0] = False
    decode_attend(q, k, v, None, state.tensors(), 6, 0.25, RULE.encode(), sees="causal", tokens=tokens)


def test_bounds():
    tokens = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1], [0] * 8, [1] * 8], dtype=torch.bool)
    assert token_bounds(tokens, 4, 3).tolist() == [[2, 6, 2, 3], [7, 7, 0, 0], [0, 7, 4, 7]]


def test_words_go_there_and_back():
    for words in WORDS:
        assert Sees.parse(words).encode() == words
    assert Sees.parse("causal corner window=4 chunk=8 mean").encode() == "causal corner window=4 chunk=8 mean"
    with pytest.raises(TypeError):
        Sees.parse("casual")
