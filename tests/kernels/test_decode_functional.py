"""decode_step against decode_attend: the same tokens kept, the same numbers, nothing changed in place."""

import pytest
import torch
from kvpass.kernels.budget import kept
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.decode_attend.functional import decode_step
from kvpass.kernels.rank.criterion import Ranking
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import assert_close, bits, empty_state, qkv, random_state
from models.states import fill_fits
from torch.fx.experimental.proxy_tensor import make_fx

HALF = {"num": 1, "den": 2, "floor": 4}
RULES = {
    "full": Rule(),
    "full with statistics": Rule(stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="sum"),
    "streaming": Rule(score="position", sinks=3, **HALF),
    "streaming slots": Rule(score="position", sinks=4, slots=9),
    "h2o": Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, **HALF),
    "h2o max": Rule(stats=("sum",), queries=-1, group="max", decode="add", score="sum", recent=1, slots=9),
    "tova": Rule(stats=("sum",), queries=1, carry=False, decode="replace", score="sum", heads="all", **HALF),
    "snapkv": Rule(stats=("sum", "count"), queries=8, decode="add", score="mean", recent=4, **HALF),
    "roco": Rule(
        stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="mean", scope_num=3, scope_den=10, sinks=1,
        recent=2, **HALF,
    ),
    "ties": Rule(stats=("sum",), queries=5, decode="none", score="sum", **HALF),
}  # fmt: skip
STEPS, SCALE = 40, 0.4


def hidden(kind, heads):
    """The whole mask [2, 1 or Hq, 1, STEPS] of a run, or None. Row 1 starts with pads and has two among its tokens."""
    pads = torch.zeros(2, 1, 1, STEPS, dtype=torch.bool)
    pads[1, ..., :5] = pads[1, ..., 17:19] = True
    g = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "bool":
        return ~pads
    if kind == "per head":  # some head always sees a token that is no pad, else its validity would change with time
        return ~pads & ((torch.rand(2, heads, 1, STEPS, generator=g) > 0.3) | (torch.arange(heads) == 0)[:, None, None])
    bias = torch.randn(2, heads, 1, STEPS, generator=g)
    return bias.masked_fill(pads, torch.finfo(torch.float32).min)


def same_state(after, before, state):
    """The functional state against the one changed in place; contents of empty slots are nobody's business."""
    used = state.used()
    for name in ("pos", "cursor"):
        assert torch.equal(getattr(after, name), getattr(state, name)), name
    for name in ("k", "v"):
        assert torch.equal(getattr(after, name)[used], getattr(state, name)[used]), name
    assert_close(after.stats[:, used], state.stats[:, used], stats=True, what="stats")
    free = ~used & (torch.arange(used.shape[-1]) != before.cursor[..., 1, None])
    assert torch.equal(bits(after.k)[free], bits(before.k)[free]), "a slot without a token was written"


def step_both(state, q, k, v, mask, position, rule):
    """One step with both forms; `state` moves on in place."""
    before = state.clone()
    args = (q, k, v, mask)
    out, *new = decode_step(*args, state.tensors(), position, SCALE, rule.encode())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(state.tensors(), before.tensors(), strict=True))
    want = decode_attend(*args, state.tensors(), position, SCALE, rule.encode())
    assert out.dtype == q.dtype
    assert_close(out, want, what=f"out at {position}")
    same_state(type(state)(new), before, state)


@pytest.mark.parametrize("kind", ["none", "bool", "per head", "bias"])
@pytest.mark.parametrize("name", list(RULES))
def test_a_run_of_steps_keeps_the_same_tokens(name, kind):
    rule = RULES[name]
    q, k, v = qkv(2, 4, 2, STEPS, 16, value_dim=8, seed=2)
    q, mask = 2 * q, hidden(kind, 4)
    state = empty_state(2, 2, (kept(rule, STEPS) if rule.evicts else STEPS) + 2, 16, rule, value_dim=8)
    for t in range(STEPS):
        now = slice(t, t + 1)
        seen = mask if mask is None else mask[..., : t + 1]
        step_both(state, q[:, :, now], k[:, :, now], v[:, :, now], seen, t, rule)
    assert not rule.evicts or (state.cursor[..., 0] < STEPS).all()


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][Ranking].heads == "each"])
def test_ragged_live_counts(name):
    rule = RULES[name]
    state = random_state(torch.tensor([[7, 3], [0, 9]]), 24, 16, rule, seen=30)
    for t in range(30, 42):
        q, k, v = qkv(2, 6, 2, 1, 16, keys=1, seed=t)
        step_both(state, q, k, v, None, t, rule)


@pytest.mark.parametrize("name", ["h2o", "h2o max", "snapkv", "roco", "streaming"])
def test_padding_between_tokens(name):
    """Windows of the newest and the oldest tokens held, where positions do not count them."""
    rule = RULES[name]
    state = random_state(torch.tensor([[9, 12], [12, 7]]), 24, 16, rule, seen=30)
    state.cursor[..., 2] -= torch.tensor([[6], [11]], dtype=torch.int32)
    shown = torch.arange(40) % 7 > 3
    shown[30:] = True
    for t in range(30, 40):
        q, k, v = qkv(2, 6, 2, 1, 16, keys=1, seed=t)
        step_both(state, q, k, v, shown[None, None, None, : t + 1], t, rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    rule = RULES["h2o"]
    state = random_state(torch.full((2, 2), 9), 14, 16, rule, seen=18, dtype=dtype)
    q, k, v = qkv(2, 4, 2, 1, 16, dtype=dtype)
    step_both(state, q, k, v, None, 18, rule)


HELD = {
    "int8": {"k_as": "int8", "v_as": "int8", "residual": 5, "whole_sinks": 2},
    "int4 rotated": {"k_as": "int4", "v_as": "int4", "rotated": True, "scale_group": 8, "residual": 6},
    "int3 and dense": {"k_as": "int3"},
    "fp8 beside int2": {"k_as": "fp8_e4m3", "v_as": "int2", "whole_sinks": 3},
    "normal levels": {"k_as": "turbo2", "v_as": "turbo4", "rotated": True, "residual": 3},
    "fits": {"k_as": "mixed_2_1", "v_as": "ternary", "k_fit": "spread", "v_fit": "range", "residual": 4},
    "channels": {"k_as": "float16", "k_fit": "channels", "kept_num": 3, "kept_den": 5, "residual": 4},
    "atoms": {"k_as": "csr4", "k_fit": "atoms", "atoms": 9, "whole_sinks": 2},
}


@pytest.mark.parametrize("kind", ["none", "bool", "bias"])
@pytest.mark.parametrize("held", list(HELD))
def test_coded_slots(held, kind):
    """Keys and values are small multiples of 1/32, so that their rotation is exact and no code hangs on a rounding."""
    rule = RULES["h2o"].replace(**HELD[held])
    (q, k, v), mask = qkv(2, 4, 2, STEPS, 16, seed=2), hidden(kind, 4)
    k, v = ((x * 32).round() / 32 for x in (k, v))
    state = State.empty(rule, k, B=2, H=2, C=kept(rule, STEPS) + 2, D=16, V=16)
    fill_fits(state, rule, torch.Generator().manual_seed(0))
    for t in range(STEPS):
        now = slice(t, t + 1)
        before, seen = state.clone(), mask if mask is None else mask[..., : t + 1]
        args = (q[:, :, now], k[:, :, now], v[:, :, now], seen)
        out, *new = decode_step(*args, state.tensors(), t, SCALE, rule.encode())
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(state.tensors(), before.tensors(), strict=True))
        assert_close(out, decode_attend(*args, state.tensors(), t, SCALE, rule.encode()), what=f"out at {t}")
        after, used = State(new, state.fields), state.used()
        for field, tensor in state.per_slot():
            if field.name != "stats":
                assert torch.equal(after[field.name][used], tensor[used]), (field.name, t)
        assert_close(after.stats[:, used], state.stats[:, used], stats=True, what="stats")
        for name in ("cursor", *(field.name for field in state.fields if "W" in field.dims)):
            assert torch.equal(after[name], state[name]), (name, t)
    assert (state.cursor[..., 0] < STEPS).all()


def test_one_column_mask_hides_or_shows_everything():
    rule = RULES["h2o"]
    state = random_state(torch.full((2, 2), 5), 14, 16, rule, seen=9)
    q, k, v = qkv(2, 4, 2, 1, 16)
    step_both(state, q, k, v, torch.tensor([True, False]).view(2, 1, 1, 1), 9, rule)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_sinks_and_softcap_against_a_dense_float64_attention(with_sinks, softcap):
    q, k, v = qkv(2, 6, 2, 12, 16, seed=4)
    sinks = torch.randn(6) if with_sinks else None
    state = empty_state(2, 2, 14, 16, RULES["full"]).tensors()
    for t in range(12):
        now = slice(t, t + 1)
        args = (q[:, :, now], k[:, :, now], v[:, :, now], None, state, t, SCALE, RULES["full"].encode())
        out, *state = decode_step(*args, sinks, softcap)
    keys, values = (x.double().repeat_interleave(3, 1) for x in (k, v))
    logits = q[:, :, -1:].double() @ keys.mT * SCALE
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, 6, 1, 1).expand(2, 6, 1, 1)], -1)
    assert_close(out, logits.softmax(-1)[..., :12] @ values, torch.float32, what="out")


def test_a_trace_of_one_step_serves_any_other():
    rule = RULES["roco"]
    state = empty_state(1, 2, 12, 16, rule)
    q, k, v = qkv(1, 4, 2, 20, 16)

    def one(q, k, v, past, *state):
        return decode_step(q, k, v, None, list(state), past.shape[0], SCALE, rule.encode())

    slots, traced = state.clone().tensors(), None
    for t in range(20):
        args = tuple(x[:, :, t : t + 1] for x in (q, k, v))
        if traced is None:
            traced = make_fx(one, tracing_mode="symbolic")(*args, torch.empty(7, 0), *state.tensors())
        want = decode_attend(*args, None, state.tensors(), t, SCALE, rule.encode())
        out, *slots = traced(*args, torch.empty(t, 0), *slots)
        assert_close(out, want, what=f"out at {t}")
        assert torch.equal(slots[2], state.pos)


def test_a_rule_of_other_statistics_is_refused():
    state = empty_state(1, 2, 12, 16, RULES["h2o"])
    with pytest.raises(ValueError, match="keeps 3 statistics, got 1"):
        decode_step(*qkv(1, 4, 2, 1, 16), None, state.tensors(), 0, SCALE, RULES["roco"].encode())
