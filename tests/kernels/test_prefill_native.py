"""prefill_attend in C++: which calls run in it, and plain loops over rows beside them."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from kvpass.kernels.attention.observation import EVEN
from kvpass.kernels.attention.softmax import Beside, Softmax
from kvpass.kernels.attention.visibility import Sees, Shown, mask_spans, token_bounds
from kvpass.kernels.native import library
from kvpass.kernels.prefill_attend.native import prefill_attend_native
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, causal_mask, qkv
from oracle.naive_attention import naive_prefill, naive_seen
from torch import Tensor

ALL = Rule(stats=("sum", "sumsq", "count"), queries=-1)
MOST = Rule(stats=("count", "sum", "sumsq"), queries=-1, group="max")
WINDOW = Rule(stats=("sum",), queries=5)

if platform.system() != "Linux":
    pytest.skip("kernels of our own are compiled on Linux only", allow_module_level=True)
assert library.function("prefill", KIND=0) is not None, "no C++ compiler: install g++"


def native(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, shown: Shown, softmax: Softmax, rule: Rule) -> Any:
    found = prefill_attend_native(q, k, v, pos, shown, softmax, rule)
    assert found is not None, "left to the reference"
    return found


def check(*call: Any) -> None:
    for found, want, what in zip(native(*call), naive_prefill(*call), ("out", "stats", "valid"), strict=True):
        assert_close(found, want, stats=what == "stats", what=what)


def with_a_past(batch: int, heads: int, past: int, queries: int, position: int) -> Tensor:
    """Positions [B, Hkv, past + queries]: each head has kept others, in any order, with empty slots among them."""
    g = torch.Generator().manual_seed(position)
    pos = torch.full((batch, heads, past + queries), -1, dtype=torch.int32)
    for own in pos.flatten(0, 1):
        own[torch.randperm(past, generator=g)[: past - 3]] = torch.randperm(position, generator=g)[: past - 3].int()
        own[past:] = torch.arange(position, position + queries)
    return pos


def holes(columns: int) -> Tensor:
    """Columns that hold a token, of two sequences: padding before, between and behind."""
    tokens = torch.ones(2, columns, dtype=torch.bool)
    tokens[0, :7] = tokens[1, 30:40] = tokens[1, columns - 4 :] = False
    return tokens


@pytest.mark.parametrize("rule", [ALL, MOST, WINDOW], ids=["all", "most", "window"])
@pytest.mark.parametrize("sees", ["", "causal", "causal window=20", "causal chunk=32", "chunk=16", "window=9"])
@pytest.mark.parametrize("padded", [False, True])
def test_words_and_tokens(sees: str, padded: bool, rule: Rule) -> None:
    """Several tiles of keys and blocks of queries; queries that see nothing."""
    q, k, v = qkv(2, 6, 2, 75, 16)
    tokens = holes(75) if padded else None
    bounds = None if tokens is None else token_bounds(tokens, 0, 75)
    check(q, k, v, None, Shown(Sees.parse(sees), 75, 0, tokens, bounds), Softmax(0.4), rule)


@pytest.mark.parametrize("sees", ["causal", "causal corner", "causal window=30", "causal chunk=32"])
@pytest.mark.parametrize("padded", [False, True])
def test_slots_behind_kept_tokens(sees: str, padded: bool) -> None:
    """Keys are found by their positions, wherever they are kept."""
    pos = with_a_past(2, 2, 70, 20, 90)
    q, k, v = qkv(2, 4, 2, 20, 24, keys=90, value_dim=40)
    tokens = holes(110) if padded else None
    bounds = None if tokens is None else token_bounds(tokens, 90, 20)
    check(q, k, v, pos, Shown(Sees.parse(sees), 20, 90, tokens, bounds), Softmax(0.4), ALL)


def test_sequences_of_a_mask_that_was_found_to_be_causal() -> None:
    q, k, v = qkv(2, 3, 1, 70, 16)
    found = Shown(Sees.parse("causal"), 70, 0, None, mask_spans(causal_mask(70, 70, left=[0, 9], right=[5, 0])))
    tokens = torch.ones(2, 70, dtype=torch.bool)
    tokens[0, 65:] = tokens[1, :9] = False
    call = Softmax(0.4), ALL
    want = naive_prefill(q, k, v, None, Shown(Sees.parse("causal"), 70, 0, tokens), *call)
    for one, other, what in zip(native(q, k, v, None, found, *call), want, ("out", "stats", "valid"), strict=True):
        assert_close(one, other, stats=what == "stats", what=what)


@pytest.mark.parametrize(("group", "dim", "wide"), [(1, 1, 1), (5, 80, 48), (50, 17, 33), (16, 130, 100)])
@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, None, 2.0)], ids=["plain", "capped"])
def test_shapes(group: int, dim: int, wide: int, softmax: Softmax) -> None:
    """Entries that fill no vector, rows that fill no lines, groups of more rows than a block has."""
    q, k, v = qkv(1, group, 1, 67, dim, value_dim=wide)
    sinks = torch.linspace(-3.0, 20.0, group)
    for one in (softmax, softmax._replace(sinks=sinks)):
        check(q, k, v, None, Shown(Sees.parse("causal"), 67), one, ALL)


@pytest.mark.parametrize("size", [1e-6, 0.03, 0.3, 3.0, 1e4])
def test_caps_of_any_size(size: float) -> None:
    """tanh where it is nearly straight, where it bends, and where it is 1."""
    q, k, v = qkv(1, 2, 1, 40, 16)
    check(q, k, v, None, Shown(Sees.parse("causal"), 40), Softmax(size, None, 1.5), ALL)


@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("padded", [False, True])
def test_who_gives_a_key_its_share(group: str, padded: bool) -> None:
    """`important` and `last` by their definition, query by query."""
    rule = Rule(stats=("important", "last"), queries=-1, group=group)
    pos = with_a_past(2, 2, 70, 20, 90)
    q, k, v = qkv(2, 4, 2, 20, 16, keys=90)
    tokens = holes(110) if padded else None
    shown = Shown(Sees.parse("causal window=60"), 20, 90, tokens, None)
    _, stats, valid = native(q, k, v, pos, shown, Softmax(1.0), rule)
    want = torch.zeros(2, 2, 2, 90, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(20):
                seen = torch.tensor([naive_seen(shown, b, i, x) for x in pos[b, h].tolist()])
                if not valid[b, i] or not seen.any():
                    continue
                logits = (q[b, 2 * h : 2 * h + 2, i].double() @ k[b, h].double().T).masked_fill(~seen, -float("inf"))
                probs = logits.softmax(-1)
                row = probs.mean(0) if group == "mean" else probs.amax(0)
                hit = row >= EVEN / int(seen.sum())
                want[0, b, h] += hit
                want[1, b, h][hit] = 90 + i + 1
    assert torch.equal(stats.double(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 4, 2, 70, 40, dtype=dtype)
    shown = Shown(Sees.parse("causal"), 70)
    out, stats, _ = native(q, k, v, None, shown, Softmax(0.2), ALL)
    exact, sums, _ = naive_prefill(q, k, v, None, shown, Softmax(0.2), ALL)
    half_a_step = 0.505 * torch.finfo(dtype).eps
    assert ((out.float() - exact).abs() <= half_a_step * exact.abs() + 2e-6).all()
    assert_close(stats, sums, stats=True)


def test_the_same_with_more_threads() -> None:
    """A head's queries are cut into the same parts, whoever does them."""
    before, found = torch.get_num_threads(), []
    q, k, v = qkv(1, 6, 2, 700, 16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native(q, k, v, None, Shown(Sees.parse("causal"), 700), Softmax(0.4), ALL))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_tokens() -> None:
    q, k, v = qkv(1, 2, 1, 0, 16)
    out, stats, valid = native(q, k, v, None, Shown(Sees.parse("causal"), 0), Softmax(0.4), ALL)
    assert (out.shape, stats.shape, valid.shape) == ((1, 2, 0, 16), (3, 1, 1, 0), (1, 0))


def test_long_prompts_in_smaller_blocks() -> None:
    """Far more keys than a block of whole height may have: few rows at a time, and few chunks."""
    keys, g = 600_000, torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, n, 4, generator=g) for n in (40, keys, keys))
    pos = torch.arange(keys, dtype=torch.int32)[None, None]
    shown = Shown(Sees.parse("causal"), 40, keys - 40)
    out, stats, _ = native(q, k, v, pos, shown, Softmax(0.5), Rule(stats=("sum",), queries=-1))
    logits = q[0, 0].double() @ k[0, 0].double().T * 0.5
    logits.masked_fill_(torch.arange(keys) > torch.arange(keys - 40, keys)[:, None], -float("inf"))
    probs = logits.softmax(-1)
    assert_close(out[0, 0], probs @ v[0, 0].double())
    assert_close(stats[0, 0, 0], probs.sum(0), stats=True)


def test_what_is_left_to_the_reference() -> None:
    q, k, v = qkv(1, 2, 1, 8, 16)
    shown = Shown(Sees.parse("causal"), 8)
    beside = Beside(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, 16))
    calls = [
        (q, shown._replace(mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)), Softmax(1.0)),
        (q, shown._replace(bias=torch.zeros(1, 1, 8)), Softmax(1.0)),
        (q, shown, Softmax(1.0, beside=beside)),
        (q.double(), shown, Softmax(1.0)),
    ]
    for asked, how, softmax in calls:
        dtype = asked.dtype
        assert prefill_attend_native(asked, k.to(dtype), v.to(dtype), None, how, softmax, ALL) is None
