"""decode_attend, single steps: poison, sentinels, masks, ties, dtypes."""

import pytest
import torch
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.budget import Budget
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import FREE, LIVE
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, bits, qkv, random_state

H2O = Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, slots=100)
ALL = Rule(stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="mean", slots=100)
LAST = Rule(stats=("sum", "count"), queries=1, decode="replace", score="sum", heads="each", slots=100)
RAGGED = torch.tensor([[7, 3], [0, 11]])
EVEN = torch.full((2, 2), 9)


def oracle(q, k_new, v_new, mask, state, position, scale, sinks=None, softcap=0.0):
    """Outputs and reduced-row inputs head by head: (out [B, Hq, Dv], probs {(b, h): (slots, [G, n])}) in float64."""
    batch, heads = q.shape[:2]
    group = heads // state.k.shape[1]
    out = torch.zeros(batch, heads, v_new.shape[-1], dtype=torch.float64)
    rows = {}
    for b in range(batch):
        for h in range(state.k.shape[1]):
            slots = state.used()[b, h].nonzero().flatten().tolist()
            keys = [state.k[b, h, s].double() for s in slots] + [k_new[b, h, 0].double()]
            values = [state.v[b, h, s].double() for s in slots] + [v_new[b, h, 0].double()]
            where = [int(state.pos[b, h, s]) for s in slots] + [position]
            probs = torch.zeros(group, len(keys), dtype=torch.float64)
            for g in range(group):
                n = h * group + g
                logits = torch.stack([q[b, n, 0].double() @ x * scale for x in keys])
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                if mask is not None:
                    here = mask.expand(batch, heads, 1, mask.shape[-1])[b, n, 0]
                    here = here.expand(position + 1) if here.shape[0] == 1 else here
                    seen = here[where]
                    logits += 0 if mask.dtype == torch.bool else seen.double()
                    shown = seen if mask.dtype == torch.bool else seen > max(torch.finfo(mask.dtype).min / 2, -1e8)
                    logits[~shown] = -torch.inf
                sink = -torch.inf if sinks is None else sinks[n].double()
                row = torch.cat([logits, torch.full((1,), sink, dtype=torch.float64)])
                probs[g] = row.softmax(-1).nan_to_num(0.0)[:-1]
                out[b, n] = probs[g] @ torch.stack(values)
            rows[b, h] = ([*slots, int(state.cursor[b, h, FREE])], probs)
    return out[:, :, None], rows


def step(
    live, rule, *, mask=None, heads=4, dim=16, value_dim=None, dtype=torch.float32, position=60, holes=True, **extras
):
    """One step from a random state; returns the state before and after."""
    new = qkv(live.shape[0], heads, live.shape[1], 1, dim, value_dim=value_dim, dtype=dtype, seed=5)
    state = random_state(live, 20, dim, rule, seen=60, value_dim=value_dim, dtype=dtype, holes=holes)
    return advance(new, state, rule, mask, position, **extras), state


def advance(new, state, rule, mask, position, **extras):
    """One step against the oracle; returns the state before."""
    before, dtype = state.clone(), new[0].dtype
    out = decode_attend(*new, mask, state.tensors(), position, 0.3, rule.encode(), **extras)
    want, rows = oracle(*new, mask, before, position, 0.3, **extras)
    assert_close(out, want, dtype, what="out")
    for (b, h), (slots, probs) in rows.items():
        row = probs.mean(0) if rule[Observation].group == "mean" else probs.amax(0)
        for i, name in enumerate(rule[Statistics].stats):
            old = before.stats[i, b, h, slots].double()
            old[-1] = 0.0
            new = {"sum": row, "sumsq": row**2, "count": (probs > 0).any(0).double()}[name]
            want_stat = {"add": old + new, "replace": new, "none": old}[rule[Observation].decode]
            assert_close(state.stats[i, b, h, slots], want_stat, dtype, stats=True, what=name)
        beyond = slice(int(before.cursor[b, h, LIVE]) + 1, None)
        for new_t, old_t in zip(state.tensors()[:3], before.tensors()[:3], strict=True):
            assert torch.equal(bits(new_t[b, h, beyond]), bits(old_t[b, h, beyond]))
        assert torch.equal(bits(state.stats[:, b, h, beyond]), bits(before.stats[:, b, h, beyond]))
    return before


@pytest.mark.parametrize("live", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("rule", [H2O, ALL, LAST, Rule(), Rule(stats=("sum",), decode="none", slots=100)])
@pytest.mark.parametrize("holes", [True, False])
def test_poisoned_empties_and_sentinels(live, rule, holes):
    step(live, rule, holes=holes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (64, 64), (80, 48), (24, 40), (256, 256)])
@pytest.mark.parametrize("live", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("rule", [H2O, Rule()], ids=["h2o", "full"])
def test_head_sizes_and_dtypes(dtype, dim, value_dim, live, rule):
    step(live, rule, dim=dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.parametrize("heads", [2, 4, 18, 32])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_groups(heads, group):
    rule = Rule(stats=("sum", "sumsq"), queries=-1, group=group, decode="add", score="sum", slots=99)
    step(RAGGED, rule, heads=heads)


def masks(heads, position):
    g = torch.Generator().manual_seed(4)
    noise = torch.rand(2, heads, 1, position + 1, generator=g) > 0.4
    noise[..., position] = True
    one_head = noise.clone()
    one_head[:, 0] = False  # a head that sees nothing must not make NaN
    smallest = torch.finfo(torch.float32).min
    return {
        "all": torch.ones(2, 1, 1, position + 1, dtype=torch.bool),
        "heads": noise,
        "row": noise[:, :1],
        "shared": noise[:1, :1],
        "one column": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "a head sees nothing": one_head,
        "wider": torch.nn.functional.pad(noise, (0, 4)),
        "float": torch.randn(2, heads, 1, position + 1, generator=g),
        "float hidden": torch.zeros(noise.shape).masked_fill(~noise, smallest),
        "float 1e9": torch.zeros(noise.shape).masked_fill(~noise, -1e9),
        "float inf": torch.zeros(noise.shape).masked_fill(~noise, -torch.inf),
    }


@pytest.mark.parametrize("name", list(masks(2, 3)))
@pytest.mark.parametrize("live", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("rule", [ALL, LAST], ids=["add", "replace"])
def test_masks_are_looked_up_by_position(name, live, rule):
    step(live, rule, mask=masks(4, 60)[name])


EXTRAS = {
    "sinks": {"sinks": torch.tensor([0.7, -1.5, 4.0, 9.0])},
    "softcap": {"softcap": 0.7},
    "both": {"sinks": torch.tensor([3.0, 0.0, -2.0, 0.5], dtype=torch.bfloat16), "softcap": 0.9},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("live", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("rule", [ALL, LAST, Rule()], ids=["add", "replace", "full"])
@pytest.mark.parametrize("name", ["none", "heads", "a head sees nothing", "float", "float 1e9"])
def test_sinks_and_softcap(name, live, rule, extras):
    step(live, rule, mask=masks(4, 60).get(name), value_dim=24, **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinks_and_softcap_in_half_precision(dtype, extras):
    step(RAGGED, H2O, dtype=dtype, dim=32, **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("live", [7, 9], ids=["grows", "evicts"])
def test_sinks_and_softcap_over_evictions(live, extras):
    """The statistics that pick the victims have the sink in the denominator."""
    rule = Rule(stats=ALL[Statistics].stats, queries=-1, decode="add", score="sum", recent=2, slots=9)
    state = random_state(torch.full((2, 2), live), 11, 16, rule, seen=30)
    for i in range(6):
        before = advance(qkv(2, 4, 2, 1, 16, seed=i), state, rule, None, 30 + i, **extras)
        if live + i >= rule[Budget].slots:
            gone = state.cursor[..., FREE, None].long()
            past = before.pos.where(before.used(), -1)
            score = state.stats[0].where((past >= 0) & (past < 29 + i), torch.inf)
            assert torch.equal(score.amin(-1, keepdim=True), score.gather(2, gone))


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_a_pad_looks_with_sinks_and_softcap(extras):
    mask = torch.ones(2, 1, 1, 61, dtype=torch.bool)
    mask[0, ..., 60] = False
    q, k_new, v_new = qkv(2, 4, 2, 1, 16, value_dim=24)
    state = random_state(RAGGED, 20, 16, H2O, seen=60, value_dim=24)
    want, _ = oracle(q, k_new, v_new, mask, state, 60, 0.3, **extras)
    out = decode_attend(q, k_new, v_new, mask, state.tensors(), 60, 0.3, H2O.encode(), **extras)
    assert_close(out, want)


@pytest.mark.parametrize("padded", [[0], [1], [0, 1]])
def test_pad_rows_change_nothing(padded):
    mask = torch.ones(2, 1, 1, 61, dtype=torch.bool)
    mask[padded, ..., 60] = False
    q, k_new, v_new = qkv(2, 4, 2, 1, 16)
    state = random_state(RAGGED, 20, 16, H2O, seen=60)
    before = state.clone()
    out = decode_attend(q, k_new, v_new, mask, state.tensors(), 60, 0.3, H2O.encode())
    assert not out.isnan().any()
    for b in range(2):
        same = torch.equal(state.pos[b], before.pos[b]) and torch.equal(state.cursor[b], before.cursor[b])
        assert same == (b in padded)
        used = before.used()[b]
        if b in padded:
            assert torch.equal(state.k[b][used], before.k[b][used])
            assert torch.equal(state.stats[:, b][:, used], before.stats[:, b][:, used])
            keys, values = before.k[b, 0][used[0]].double(), before.v[b, 0][used[0]].double()
            want = (q[b, :2, 0].double() @ keys.T * 0.3).softmax(-1) @ values
            assert_close(out[b, :2, 0], want, torch.float32)


@pytest.mark.parametrize("live", [torch.full((1, 1), 5), torch.tensor([[5, 5, 2]])], ids=["even", "ragged"])
def test_ties_evict_the_newer(live):
    rule = Rule(stats=("sum",), queries=-1, decode="none", score="sum", recent=1, slots=5)
    state = random_state(live, 9, 16, rule, seen=5, holes=False)
    state.stats[:, :, 0, :5] = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])
    state.pos[:, 0, :5] = torch.tensor([4, 2, 3, 1, 0], dtype=torch.int32)
    zero = torch.zeros(1, live.shape[1], 1, 16)
    decode_attend(zero, zero, zero, None, state.tensors(), 5, 0.3, rule.encode())
    assert state.cursor[0, 0].tolist() == [5, 2, 6, 0]
    assert state.pos[0, 0, :6].tolist() == [4, 2, -1, 1, 0, 5]


def test_golden_victims():
    """policies.md 7.2: which slot goes, from the statistics of five tokens; the newest is the appended one."""
    sums, squares = [2.95, 0.6, 0.85, 0.4], [2.1575, 0.09, 0.2525, 0.08]
    cases = {
        3: Rule(stats=("sum", "sumsq", "count"), decode="none", score="sum", recent=1, slots=4),
        1: Rule(stats=ALL[Statistics].stats, decode="none", score="mean", scope_num=1, scope_den=4, recent=1, slots=4),
    }
    for victim, rule in cases.items():
        state = random_state(torch.tensor([[4]]), 6, 16, rule, seen=4, holes=False)
        state.pos[0, 0, :4] = torch.arange(4)
        state.stats[:, 0, 0, :4] = torch.tensor([sums, squares, [5, 4, 3, 2]])
        zero = torch.zeros(1, 1, 1, 16)
        decode_attend(zero, zero, zero, None, state.tensors(), 4, 1.0, rule.encode())
        assert state.cursor[0, 0, FREE] == victim
    row = torch.tensor([0.25, 0.15, 0.2, 0.2, 0.2]).log()
    rule = Rule(stats=("sum",), queries=1, decode="replace", score="sum", heads="all", slots=4)
    state = random_state(torch.tensor([[4]]), 6, 5, rule, seen=4, holes=False)
    state.pos[0, 0, :4], state.k[0, 0, :4] = torch.arange(4), torch.eye(5)[:4]
    new = torch.eye(5)[4].view(1, 1, 1, 5)
    decode_attend(row.view(1, 1, 1, 5), new, new, None, state.tensors(), 4, 1.0, rule.encode())
    assert state.cursor[0, 0].tolist() == [4, 1, 5, 0]


def test_shared_heads_evict_the_same_token():
    rule = Rule(stats=("sum",), queries=1, decode="replace", score="sum", heads="all", slots=9)
    state = random_state(torch.full((2, 3), 9), 12, 16, rule, seen=9, holes=False)
    state.pos[..., :9] = torch.arange(9)
    q, k_new, v_new = qkv(2, 6, 3, 1, 16)
    decode_attend(q, k_new, v_new, None, state.tensors(), 9, 0.3, rule.encode())
    assert (state.cursor[..., FREE] == state.cursor[:, :1, FREE]).all()
    score = state.stats[0, ..., :10].mean(1)
    assert torch.equal(state.cursor[:, 0, FREE].long(), score.argmin(-1))


@pytest.mark.parametrize(
    ("index", "value", "word"),
    [
        (0, torch.zeros(2, 4, 2, 16), "fit"),
        (0, torch.zeros(2, 3, 1, 16), "fit"),
        (0, torch.zeros(2, 4, 1, 16).half(), "agree"),
        (8, torch.zeros(3), "sinks"),
        (9, -1.0, "softcap"),
    ],
)
def test_refuses(index, value, word):
    q, k_new, v_new = qkv(2, 4, 2, 1, 16)
    state = random_state(EVEN, 20, 16, H2O, seen=60)
    args = [q, k_new, v_new, None, state.tensors(), 60, 0.3, H2O.encode(), None, 0.0]
    args[index] = value
    with pytest.raises(ValueError, match=word):
        decode_attend(*args)
