"""A bias per slot in every op that attends: against softmax in float64, where it is one more number in a logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.decode_attend.attend_only import attend_only
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.functional import decode_step, supports
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.cursor import FREE
from kvpass.kernels.slots.moves import rows_of, with_slots
from kvpass.kernels.slots.ragged import starts
from kvpass.kernels.slots.state import FIELDS, State, fields_of
from kvpass.kernels.testing import qkv
from models.states import state_under
from torch import Tensor

SEEN, SCALE, HEADS, KV, DIM = 30, 0.3, 4, 2, 16
HALF = {"num": 1, "den": 2, "floor": 4}
SUMS = Rule(Refit(4), stats=("sum",), queries=-1, decode="add", score="sum", sinks=2, recent=2, **HALF)
RAGGED = SUMS.replace(ragged=True)


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dim of float64 [.., Hq, n], with one logit more per head."""
    if sinks is not None:
        column = sinks.double().view(-1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1)


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """One head group: q [G, D], k [n, D], v, bias [n]: output [G, Dv] and probabilities [G, n]."""
    logits = SCALE * q.double() @ k.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    probs = softmax(logits + bias.double(), sinks)
    return probs @ v.double(), probs


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("rule", [SUMS, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("how", [decode_attend_reference, decode_attend_device], ids=["reference", "device"])
def test_a_step(how: Any, rule: Rule, softcap: float) -> None:
    """Outputs and what is observed have the bias in them; the token's own is 0, whatever its slot had."""
    state = state_under(rule, SEEN)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    before, (q, k, v) = state.clone(), qkv(2, HEADS, KV, 1, DIM, keys=1)
    out = how(Token(q, k, v), state, Call.of_step(None, SEEN, Softmax(SCALE, sinks, softcap), rule))
    flat = {name: before[name].flatten(0, 2) for name in ("k", "v", "pos", BIAS)}
    sums = before.stats[0].flatten(), state.stats[0].flatten()
    for b in range(2):
        for h in range(KV):
            live, free = before.cursor[b, h, :2].tolist()
            places = int(starts(before.cursor, before.slots)[b, h]) + torch.arange(live + 1)
            old = places[torch.arange(live + 1) != free]
            own = slice(h * 2, h * 2 + 2)
            biases = torch.cat([flat[BIAS][old], torch.zeros(1)])
            keys, values = (torch.cat([flat[n][old], x[b, h]]) for n, x in (("k", k), ("v", v)))
            want, probs = naive(q[b, own, 0], keys, values, biases, softcap, sinks[own])
            close(out[b, own, 0], want)
            close(sums[1][old] - sums[0][old], probs.mean(0)[:-1])
            assert state[BIAS].flatten()[places[0] + free] == 0.0


def test_a_pads_query() -> None:
    rule = SUMS
    state = state_under(rule, SEEN)
    q = qkv(2, HEADS, KV, 1, DIM, keys=1)[0]
    out = attend_only(q, state, Call.of_step(None, SEEN, Softmax(SCALE), rule))
    used = state.used()
    for b in range(2):
        for h in range(KV):
            at = used[b, h]
            want, _ = naive(
                q[b, 2 * h : 2 * h + 2, 0], state.k[b, h, at], state.v[b, h, at], state[BIAS][b, h, at], 0, None
            )
            close(out[b, 2 * h : 2 * h + 2, 0], want)


def test_a_pure_step() -> None:
    assert supports(SUMS)
    state = state_under(SUMS, SEEN)
    q, k, v = qkv(2, HEADS, KV, 1, DIM, keys=1)
    out, *after = decode_step(q, k, v, None, state.tensors(), SEEN, SCALE, SUMS.encode())
    want = decode_attend(q, k, v, None, state.tensors(), SEEN, SCALE, SUMS.encode())
    close(out, want)
    held, used = State.of(after, SUMS), state.used()
    assert torch.equal(held.pos, state.pos)
    assert torch.equal(held[BIAS][used], state[BIAS][used])


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_a_later_call(mask: str) -> None:
    """Past slots with biases and five new tokens: outputs, sums, and rows of the window."""
    rule = SUMS.replace(reads=("rows",))
    state, count = state_under(rule, SEEN), 5
    q, k, v = qkv(2, HEADS, KV, count, DIM)
    keys, values, pos, _, bias = join_slots(state.tensors(), k, v, SEEN, rule.encode())
    assert torch.equal(bias[..., -count:], torch.zeros(2, KV, count))
    causal = torch.ones(count, SEEN + count, dtype=torch.bool).tril(SEEN)[None, None]
    given = {"none": None, "bool": causal, "float": None}[mask]
    added = torch.zeros(1, HEADS, count, SEEN + count)
    if mask == "float":
        added = torch.randn(1, HEADS, count, SEEN + count, generator=torch.Generator().manual_seed(1))
        given = added.masked_fill(~causal, torch.finfo(torch.float32).min)
    told = {"position": SEEN, "bias": bias}
    shape = (SCALE, "causal" if mask == "none" else "", rule.encode())
    out, stats, valid = prefill_attend(q, keys, values, pos, given, *shape, **told)
    rows = window_rows(q, keys, pos, given, valid, *shape[:2], rule.replace(queries=3).encode(), **told)
    for b in range(2):
        for h in range(KV):
            total = torch.zeros(pos.shape[2], dtype=torch.float64)
            for i in range(count):
                seen = (pos[b, h] >= 0) & (pos[b, h] <= SEEN + i)
                for g in range(2):
                    at = 2 * h + g
                    extra = bias[b, h, seen] + added[0, at, i, pos[b, h, seen].long()]
                    want, probs = naive(q[b, at, i][None], keys[b, h, seen], values[b, h, seen], extra, 0, None)
                    close(out[b, at, i], want[0])
                    total[seen] += probs[0] / 2
                    if i >= count - 3:
                        close(rows[b, h, g, i - count + 3, seen], probs[0])
            close(stats[0, b, h], total)


def test_slots_take_their_bias_along() -> None:
    """Growth, rows and compaction; a prompt's slots have 0."""
    state = state_under(SUMS, SEEN)
    grown = with_slots(state, state.slots + 7)
    assert torch.equal(grown[BIAS][..., : state.slots], state[BIAS])
    assert not grown[BIAS][..., state.slots :].any()
    assert torch.equal(rows_of(state, torch.tensor([1, 0, 1]))[BIAS], state[BIAS][[1, 0, 1]])
    idx = torch.tensor([[[0, 3, 5], [1, 2, 4]]] * 2, dtype=torch.int32)
    cursor = state.cursor.clone()
    cursor[..., : FREE + 1] = 3
    out = grown.clone()
    compact_slots([tensor for _, tensor in state.per_slot()], idx, cursor, out.tensors(), SUMS.encode())
    assert torch.equal(out[BIAS][..., :3], state[BIAS].gather(2, idx.long()))
    keys = [state.k, state.v, None, state.stats, None]
    compact_slots(keys, idx, cursor, out.tensors(), SUMS.encode())
    assert not out[BIAS][..., :3].any()


def test_who_has_one() -> None:
    assert biased(SUMS)
    assert fields_of(SUMS)[-1].name == BIAS
    plain = Rule(stats=("sum",), merge_into="one_slot", **HALF)
    assert not biased(plain)
    assert biased(plain.replace(merge_bias="count"))
    assert fields_of(Rule(stats=("sum",), **HALF)) is FIELDS


def test_a_prompt_has_none() -> None:
    q, k, v = qkv(1, HEADS, KV, 4, DIM)
    with pytest.raises(ValueError, match="bias must be float32"):
        prefill_attend(q, k, v, None, None, SCALE, "causal", SUMS.encode(), bias=torch.zeros(1, KV, 4))


def test_half_precision() -> None:
    """A later call in bfloat16 says what it says in float32, within its rounding."""
    state = state_under(SUMS, SEEN)
    given = join_slots(state.tensors(), *qkv(2, HEADS, KV, 5, DIM)[1:], SEEN, SUMS.encode())
    (keys, values, pos, _, bias), q = given, qkv(2, HEADS, KV, 5, DIM)[0]
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = (x.to(dtype) for x in (q, keys, values))
        outs.append(prefill_attend(*tensors, pos, None, SCALE, "causal", SUMS.encode(), position=SEEN, bias=bias)[0])
    assert outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outs[1].float(), outs[0], rtol=0.03, atol=0.03)
