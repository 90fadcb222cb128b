"""The registered ops: schemas, fakes, and mutation in place under Inductor with dynamic shapes."""

import re

import pytest
import torch
from kvpass.kernels.codecs.storage import fit_fields
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, causal_mask, qkv, random_state
from models.states import state_under
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

import kvpass.ops

H2O = Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, slots=9)
TEXT = H2O.encode()
LIVE = torch.tensor([[9, 9], [9, 9]])


CODED = H2O.replace(k_as="int4", v_as="fp8_e4m3", rotated=True, scale_group=7, residual=4, whole_sinks=2)
CODES = CODED.encode()
ALIKE = Rule(k_as="int4", v_as="int4").encode()
FITTED = H2O.replace(k_as="mixed_2_1", v_as="ternary", k_fit="spread", v_fit="range", scale_group=7, residual=4)


def coded_state():
    return state_under(CODED, 30).tensors()


def fitted(first):
    """What `encode_fitted` takes behind keys and values."""
    held = state_under(FITTED, 30)
    codes = [held[f"{half}_{part}"] for half, parts in FITTED_PARTS for part in parts]
    past = [] if first else [torch.cat([x, x[:, :, :6]], 2) for x in codes]
    return [held[name] for name in fit_fields(FITTED)], past, FITTED.encode()


FITTED_PARTS = ("k", ("codes", "scale", "low")), ("v", ("codes", "scale"))


TIERS = H2O.replace(k_as="int4", v_as="int2", scale_group=7, by_score=True)


def tiers():
    return state_under(TIERS, 30)


def state():
    return random_state(LIVE, 12, 16, H2O, seen=30).tensors()


MERGING = H2O.replace(merge_into="nearest_key", merge_halves="both", merge_gate="moving")


def merging():
    return random_state(torch.full((2, 2), 3), 12, 16, MERGING, seen=6).tensors()


FITTING = H2O.replace(refit_queries=4)
ROWS = Rule(queries=3, scorer="rms", reads=("rows",)).encode()


def fitting():
    return random_state(torch.full((2, 2), 3), 12, 16, FITTING, seen=6).tensors()


def calls():
    q, k, v = qkv(2, 4, 2, 6, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    one = [x[:, :, :1].contiguous() for x in (q, k, v)]
    now = state()
    pos = torch.arange(6, dtype=torch.int32).expand(2, 2, 6).contiguous()
    alive = torch.ones(2, 6, dtype=torch.bool)
    stats = torch.rand(1, 2, 2, 6)
    idx = torch.tensor([0, 2, 3, -1], dtype=torch.int32).expand(2, 2, 4).contiguous()
    cursor = torch.tensor([3, 3, 6, 0], dtype=torch.int32).expand(2, 2, 4).contiguous()
    mask = causal_mask(6, 6, left=[0, 2])
    row = torch.ones(2, 1, 1, 31, dtype=torch.bool)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    given = (q, k, v, pos, mask, 0.25, "")
    beside = "", *[None] * 10, tiers().whole_at
    return {
        "prefill_attend": (q, k, v, None, None, 0.25, "causal", TEXT),
        "prefill_attend masked": (q, k, v, None, mask, 0.25, "", TEXT),
        "prefill_attend capped": (q, k, v, None, mask, 0.25, "", TEXT, sinks, 5.0),
        "prefill_attend strided": (*strided, None, None, 0.25, "causal", ""),
        "prefill_attend extend": (q, k, v, pos, mask, 0.25, "", TEXT),
        "prefill_attend words": (q, k, v, None, None, 0.25, "causal", TEXT, None, 0.0, real, None, 0),
        "encode_slots": (k, v, CODES),
        "encode_slots half": (k, v.bfloat16(), Rule(v_as="int2").encode()),
        "encode_slots alike": (k, v, ALIKE),
        "fit_slots": (q, k, v, real, torch.zeros_like(cursor), fitted(True)[0], FITTED.encode()),
        "encode_fitted": (k, v, *fitted(True)),
        "encode_fitted extend": (k, v, *fitted(False)),
        "decode_attend fitted": (*one, row, state_under(FITTED, 30).tensors(), 30, 0.25, FITTED.encode()),
        "keep_whole": (k, v, torch.ones(2, k.shape[2], dtype=torch.bool), 30, coded_state(), CODES),
        "choose_whole": (k, v, pos, stats[0], tiers().tensors(), TIERS.encode()),
        "choose_whole first": (k, v, None, stats[0], tiers().tensors(), TIERS.encode()),
        "score_slots tiers": (stats, stats.clone(), pos, alive, cursor, 0, TIERS.encode(), *beside),
        "decode_attend tiers": (*one, row, tiers().tensors(), 30, 0.25, TIERS.encode()),
        "join_slots codes": (coded_state(), k, v, 30, CODES),
        "decode_attend codes": (*one, row, coded_state(), 30, 0.25, CODES),
        "token_bounds": (real, 2, 4),
        "join_slots": (now, k, v, 30, TEXT),
        "score_slots": (stats, None, None, alive, cursor, 0, TEXT),
        "score_slots extend": (stats, stats.clone(), pos, alive, cursor, 0, TEXT),
        "score_slots full": (stats, None, None, alive, cursor, 0, Rule(stats=("sum",)).encode()),
        "select_slots": (stats[0], cursor, 4),
        "compact_slots": ([k, v, None, stats], idx, cursor, state(), TEXT),
        "compact_slots extend": ([k, v, pos, stats], idx, cursor, state(), TEXT),
        "merge_slots": (k, v, stats[0], stats, idx, merging(), MERGING.encode()),
        "prefill_attend biases": (*given, TEXT, None, 0.0, None, None, 0, None, None, stats[0]),
        "window_rows biases": (q, k, pos, mask, alive, 0.25, "", ROWS, None, 0.0, None, 0, None, None, stats[0]),
        "refit_slots": (q, k, v, pos, mask, alive, 0.25, "", stats[0], idx, fitting(), FITTING.encode()),
        "decode_attend biases": (*one, row, state_under(FITTING, 30).tensors(), 30, 0.25, FITTING.encode()),
        "decode_attend": (*one, None, state(), 30, 0.25, TEXT),
        "decode_attend masked": (*one, row, state(), 30, 0.25, TEXT),
        "decode_attend capped": (*one, row, state(), 30, 0.25, TEXT, sinks, 5.0),
        "decode_attend words": (*one, None, state(), 30, 0.25, TEXT, None, 0.0, 0, None, "causal", row[:, 0, 0], None),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name):
    op = getattr(torch.ops.kvpass, name.split()[0]).default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, calls()[name], test_utils=tests)


@pytest.mark.parametrize("name", list(calls()))
def test_outputs_share_no_memory(name):
    """Neither with each other nor with what was given: else Inductor may write over one while another is read."""
    given = calls()[name]
    found = getattr(torch.ops.kvpass, name.split()[0]).default(*given)
    made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor) and x.numel()]
    places = [x.untyped_storage().data_ptr() for x in made]
    assert len(set(places)) == len(places)
    inputs = [x.untyped_storage().data_ptr() for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
    assert not set(places) & set(inputs)


def test_fakes_put_no_guard_on_capacity():
    """One trace serves every capacity, length and position."""

    def step(q, k_new, v_new, k, v, pos, stats, cursor, position):
        return torch.ops.kvpass.decode_attend(q, k_new, v_new, None, [k, v, pos, stats, cursor], position, 0.25, TEXT)

    counter = CompileCounter()
    run = torch.compile(step, backend=counter, dynamic=True)
    for slots in (12, 13, 40):
        tensors = random_state(LIVE, slots, 16, H2O, seen=30 + slots).tensors()
        q, k, v = qkv(2, 4, 2, 1, 16)
        run(q, k, v, *tensors, 30 + slots)
    assert counter.frame_count == 1


def decode(q, k_new, v_new, k, v, pos, stats, cursor, position):
    out = torch.ops.kvpass.decode_attend(
        q * 2, k_new + 1, v_new, None, [k, v, pos, stats, cursor], position, 0.25, TEXT
    )
    return out.transpose(1, 2).flatten(2) + 1


def test_decode_mutates_in_place_under_inductor():
    q, k_new, v_new = qkv(2, 4, 2, 1, 16)
    eager, compiled = state(), state()
    want = decode(q, k_new, v_new, *eager, 30)
    run = torch.compile(decode, dynamic=True)
    pointers = [t.data_ptr() for t in compiled]
    got, (code, *_) = run_and_get_code(run, q, k_new, v_new, *compiled, 30)
    assert_close(got, want, what="out")
    for name, a, b in zip(("k", "v", "pos", "stats", "cursor"), compiled, eager, strict=True):
        assert_close(a.nan_to_num(7.0), b.nan_to_num(7.0), what=name)
    assert pointers == [t.data_ptr() for t in compiled]
    assert_no_copy_of_state(code, "decode_attend")
    for step in range(31, 34):  # other positions, same code
        assert_close(run(q, k_new, v_new, *compiled, step), decode(q, k_new, v_new, *eager, step), what=f"step {step}")


def assert_no_copy_of_state(code, op):
    """The op must get the graph's own inputs, and nothing may be copied back into them."""
    call = re.search(rf"torch\.ops\.kvpass\.{op}\.default\((.*)\)", code)
    assert call, code
    inputs = set(re.findall(r"\barg\d+_1\b", call.group(1)))
    assert len(inputs) >= 5, f"state arguments are not graph inputs: {call.group(0)}"
    assert "copy_" not in code.split("def call", 1)[1], "Inductor copies state back"


def prefill(q, k, v, state_k, state_v, pos, stats, cursor):
    out, seen, valid = torch.ops.kvpass.prefill_attend(q, k, v, None, None, 0.25, "causal", TEXT)
    score, seen, after = torch.ops.kvpass.score_slots(seen, None, None, valid, cursor, 0, TEXT)
    idx = torch.ops.kvpass.select_slots(score, after, pos.shape[-1])
    torch.ops.kvpass.compact_slots([k, v, None, seen], idx, after, [state_k, state_v, pos, stats, cursor], TEXT)
    return out * 2


def extend(q, k, v, state_k, state_v, pos, stats, cursor, mask, position):
    keys, values, where, past = torch.ops.kvpass.join_slots(
        [state_k, state_v, pos, stats, cursor], k, v, position, TEXT
    )
    out, seen, valid = torch.ops.kvpass.prefill_attend(q, keys, values, where, mask, 0.25, "", TEXT, position=position)
    score, seen, after = torch.ops.kvpass.score_slots(seen, past, where, valid, cursor, position, TEXT)
    idx = torch.ops.kvpass.select_slots(score, after, pos.shape[-1])
    torch.ops.kvpass.compact_slots(
        [keys, values, where, seen], idx, after, [state_k, state_v, pos, stats, cursor], TEXT
    )
    return out * 2


@pytest.mark.parametrize("kind", ["prefill", "extend"])
def test_prefill_and_extend_mutate_in_place_under_inductor(kind):
    function = {"prefill": prefill, "extend": extend}[kind]
    run = torch.compile(function, dynamic=True)
    for length in (20, 33):
        q, k, v = qkv(2, 4, 2, length, 16)
        eager, compiled = state(), state()
        rest = (causal_mask(length, 30 + length), 30) if kind == "extend" else ()
        want = function(q, k, v, *eager, *rest)
        if length == 20:
            got, (code, *_) = run_and_get_code(run, q, k, v, *compiled, *rest)
            assert_no_copy_of_state(code, "compact_slots")
        else:
            got = run(q, k, v, *compiled, *rest)
        assert_close(got, want, what="out")
        for a, b in zip(compiled, eager, strict=True):
            assert_close(a.nan_to_num(7.0), b.nan_to_num(7.0), what=kind)


def test_registration_is_idempotent():
    assert kvpass.ops._register() is None
    assert kvpass.ops.decode_attend is torch.ops.kvpass.decode_attend.default
