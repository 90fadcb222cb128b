"""score_slots, select_slots, compact_slots, join_slots and the choice of implementation, each on its own."""

import subprocess
import sys

import pytest
import torch
from kvpass.kernels.choose import implementation, use
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.rank.criterion import UNTOUCHABLE
from kvpass.kernels.rank.ranking import ordered, slot_scores, untouchable
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import FIRST, FREE, LIVE, SEEN
from kvpass.kernels.testing import assert_close, bits, empty_state, qkv, random_state

INF = float("inf")


def fresh_cursor(batch=1, heads=1):
    return torch.tensor([0, 0, 0, -1], dtype=torch.int32).expand(batch, heads, 4).contiguous()


def valid(length, batch=1):
    return torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "want"), [("avg", [0.1, 0.3, 0.283333, 0.233333, 0.033333]), ("max", [0.2, 0.6, 0.6, 0.6, 0.05])]
)
def test_golden_pooling(kind, want):
    """policies.md 7.2."""
    rule = Rule(stats=("sum",), queries=-1, pool=kind, pool_size=3, score="sum", slots=5)
    raw = torch.tensor([[[[0.1, 0.2, 0.6, 0.05, 0.05]]]])
    score, stats, _ = score_slots(raw, None, None, valid(5), fresh_cursor(), 0, rule.encode())
    assert_close(score, torch.tensor([[want]]), stats=True)
    assert_close(stats[0], torch.tensor([[want]]), stats=True)


def test_pool_leaves_window_pads_and_empties_out():
    rule = Rule(stats=("sum",), queries=2, pool="max", pool_size=3, score="sum", slots=9)
    pos = torch.tensor([[[-1, 0, 3, 4, 5, 6, 7]]], dtype=torch.int32)
    raw = torch.tensor([[[[0.0, 1.0, 2.0, 9.0, 3.0, 8.0, 7.0]]]])
    alive = torch.tensor([[False, True, True, True]])  # position 4 is a pad
    cursor = torch.tensor([[[2, 2, 4, 0]]], dtype=torch.int32)
    score, stats, after = score_slots(raw, None, pos, alive, cursor, 4, rule.encode())
    assert stats[0, 0, 0].tolist() == [0.0, 2.0, 3.0, 9.0, 3.0, 8.0, 7.0]  # the pad parts no neighbours
    assert score[0, 0].tolist() == [-INF, 2.0, 3.0, -INF, 3.0, 8.0, 7.0]
    assert after[0, 0].tolist() == [5, 5, 7, 0]


def test_protection_budget_and_first():
    rule = Rule(score="position", sinks=2, recent=1, recent_num=1, recent_den=4, num=1, den=2)
    alive = torch.tensor([[False] * 2 + [True] * 8, [True] * 10])
    score, _, cursor = score_slots(torch.zeros(0, 2, 1, 10), None, None, alive, fresh_cursor(2), 0, rule.encode())
    assert cursor[:, 0].tolist() == [[4, 4, 8, 2], [5, 5, 10, 0]]
    assert score[0, 0].tolist() == [-INF, -INF, INF, INF, 2, 3, 4, 5, INF, INF]
    assert score[1, 0].tolist() == [INF, INF, 2, 3, 4, 5, 6, 7, INF, INF]


def test_carry_adds_or_replaces():
    raw, past = torch.rand(1, 1, 1, 6), torch.rand(1, 1, 1, 6)
    pos = torch.arange(6, dtype=torch.int32).view(1, 1, 6)
    cursor = torch.tensor([[[4, 4, 4, 0]]], dtype=torch.int32)
    for carry in (True, False):
        rule = Rule(stats=("sum",), queries=-1, score="sum", carry=carry, slots=6)
        _, stats, _ = score_slots(raw, past, pos, valid(2), cursor, 4, rule.encode())
        assert torch.equal(stats, raw + past if carry else raw)


def test_golden_scope():
    """policies.md 7.2: RoCo's scope of three keeps the high-variance slot 0 out of reach; slot 1 is the lowest."""
    rule = Rule(stats=("sum", "sumsq", "count"), queries=-1, score="mean", scope_num=1, scope_den=4, recent=1, slots=4)
    rows = [[1.0], [0.85, 0.15], [0.5, 0.15, 0.35], [0.35, 0.15, 0.3, 0.2], [0.25, 0.15, 0.2, 0.2, 0.2]]
    probs = torch.tensor([row + [0.0] * (5 - len(row)) for row in rows])
    stats = torch.stack([probs.sum(0), (probs**2).sum(0), torch.tensor([5.0, 4, 3, 2, 1])]).view(3, 1, 1, 5)
    score, _, cursor = score_slots(stats, None, None, valid(5), fresh_cursor(), 0, rule.encode())
    assert score[0, 0, 0] == UNTOUCHABLE
    assert score[0, 0, 4] == INF
    assert select_slots(score, cursor, 4)[0, 0].tolist() == [0, 2, 3, 4]


def test_heads_all_shares_the_mean():
    rule = Rule(stats=("sum",), queries=1, score="sum", heads="all", slots=3)
    stats = torch.rand(1, 2, 3, 7)
    score, _, _ = score_slots(stats, None, None, valid(7, 2), fresh_cursor(2, 3), 0, rule.encode())
    assert_close(score, stats[0].mean(1, keepdim=True).expand(2, 3, 7), stats=True)


def test_not_evicting_keeps_every_candidate():
    alive = torch.tensor([[True, False, True]])
    score, _, cursor = score_slots(torch.zeros(0, 1, 1, 3), None, None, alive, fresh_cursor(), 0, "")
    assert cursor[0, 0].tolist() == [2, 2, 2, 0]
    assert select_slots(score, cursor, 3)[0, 0].tolist() == [0, 2, -1]


def test_a_call_of_pads_only_changes_nothing():
    cursor = torch.tensor([[[2, 1, 2, 3]]], dtype=torch.int32)
    pos = torch.tensor([[[-1, 3, 4, 5, 6]]], dtype=torch.int32)
    rule = Rule(score="position", recent=1, slots=2)
    alive = torch.zeros(1, 2, dtype=torch.bool)
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    score, _, after = score_slots(torch.zeros(0, 1, 1, 5), None, pos, alive, cursor, 5, rule.encode(), mask=nothing)
    assert score[0, 0].tolist() == [-INF, 0, INF, -INF, -INF]
    assert after[0, 0].tolist() == [2, 2, 2, 3]


@pytest.mark.parametrize("sizes", [3, torch.tensor([[[3], [1]], [[5], [2]]])])
def test_untouchable_breaks_ties_by_age(sizes):
    spread = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 1.0]).expand(2, 2, 6).contiguous()
    pos = torch.tensor([5, 9, 2, 7, 0, 3], dtype=torch.int32).expand(2, 2, 6)
    got = untouchable(spread, pos, sizes)
    order = [1, 2, 5, 0, 3, 4]
    for b in range(2):
        for h in range(2):
            n = sizes if isinstance(sizes, int) else int(sizes[b, h])
            assert set(got[b, h].nonzero().flatten().tolist()) == set(order[:n])


def test_ordered_keys_sort_like_floats():
    value = torch.tensor([-INF, -2.0, -0.0, 0.0, 1e-40, 1.0, 3e38, INF])
    key = ordered(value, torch.zeros(8, dtype=torch.int32))
    assert key[2] == key[3]
    assert (key.diff() >= 0).all()
    assert ordered(value[5:6], torch.tensor([3])) > ordered(value[5:6], torch.tensor([4]))


def test_slot_scores_for_inspection():
    rule = Rule(stats=("sum", "count"), score="mean")
    stats = torch.tensor([[3.0, 1.0], [2.0, 0.0]]).view(2, 1, 1, 2)
    assert slot_scores(stats, torch.zeros(1, 1, 2), rule).flatten().tolist() == [1.5, 1.0]


@pytest.mark.parametrize("length", [1, 7, 300, 1025])
def test_select_keeps_the_best_and_breaks_ties_by_index(length):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 5, (2, 3, length), generator=g).float()
    score[0, 0, : length // 2] = INF
    score[1] = 0.0
    cursor = torch.zeros(2, 3, 4, dtype=torch.int32)
    cursor[..., LIVE] = torch.randint(0, length + 1, (2, 3), generator=g)
    cursor[0, 1, LIVE] = length
    capacity = length + 2
    got = select_slots(score, cursor, capacity)
    assert got.shape == (2, 3, capacity)
    assert got.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            n = int(cursor[b, h, LIVE])
            order = sorted(range(length), key=lambda i, r=score[b, h]: (-float(r[i]), i))
            assert got[b, h].tolist() == sorted(order[:n]) + [-1] * (capacity - n)


def test_select_when_every_head_keeps_as_many():
    score = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]]])
    cursor = torch.tensor([[[3, 3, 5, 0]] * 2], dtype=torch.int32)
    assert select_slots(score, cursor, 3).tolist() == [[[1, 2, 3], [0, 1, 2]]]
    assert select_slots(score, cursor, 4).tolist() == [[[1, 2, 3, -1], [0, 1, 2, -1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_compact_gathers_and_leaves_the_rest(dtype, given, strided):
    rule = Rule(stats=("sum", "count"), score="sum", slots=9)
    live = torch.tensor([[3, 0], [5, 1]])
    state = random_state(live, 12, 16, rule, seen=20, value_dim=24, dtype=dtype)
    before = state.clone()
    _, k, v = qkv(2, 2, 2, 14, 16, value_dim=24, dtype=dtype)
    if strided:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    pos = torch.arange(100, 114, dtype=torch.int32).expand(2, 2, 14).contiguous() if given else None
    stats = torch.rand(2, 2, 2, 14)
    cursor = torch.zeros(2, 2, 4, dtype=torch.int32)
    cursor[..., LIVE] = cursor[..., FREE] = torch.tensor([[4, 2], [0, 7]])
    cursor[..., SEEN], cursor[..., FIRST] = 30, 1
    score = torch.rand(2, 2, 14)
    idx = select_slots(score, cursor, 8)
    compact_slots((k, v, pos, stats), idx, cursor, state.tensors(), rule.encode())
    assert torch.equal(state.cursor, cursor)
    for b in range(2):
        for h in range(2):
            n = int(cursor[b, h, LIVE])
            rows = idx[b, h, :n].long()
            assert torch.equal(state.k[b, h, :n], k[b, h, rows])
            assert torch.equal(state.v[b, h, :n], v[b, h, rows])
            assert torch.equal(state.stats[:, b, h, :n], stats[:, b, h, rows])
            assert state.pos[b, h].tolist() == [int(r) + 100 * given for r in rows] + [-1] * (12 - n)
            for new, old in ((state.k, before.k), (state.v, before.v)):
                assert torch.equal(bits(new[b, h, n:]), bits(old[b, h, n:]))
            assert torch.equal(bits(state.stats[:, b, h, n:]), bits(before.stats[:, b, h, n:]))


def test_join_sorts_the_past_and_cleans_empties():
    rule = Rule(stats=("sum",))
    state = random_state(torch.tensor([[4, 0], [7, 2]]), 9, 16, rule, seen=30, value_dim=8)
    _, k_new, v_new = qkv(2, 2, 2, 3, 16, value_dim=8)
    k, v, pos, stats = join_slots(state.tensors(), k_new, v_new, 30, rule.encode())
    assert k.shape == (2, 2, 12, 16)
    assert v.shape == (2, 2, 12, 8)
    used = state.used()
    for b in range(2):
        for h in range(2):
            here = used[b, h].nonzero().flatten()
            here = here[state.pos[b, h, here].argsort()]
            empty = 9 - len(here)
            assert pos[b, h].tolist() == [-1] * empty + state.pos[b, h, here].tolist() + [30, 31, 32]
            assert not k[b, h, :empty].any()
            assert not v[b, h, :empty].any()
            assert torch.equal(k[b, h, empty:], torch.cat([state.k[b, h, here], k_new[b, h]]))
            assert torch.equal(v[b, h, empty:], torch.cat([state.v[b, h, here], v_new[b, h]]))
            want = [0.0] * empty + state.stats[0, b, h, here].tolist() + [0.0] * 3
            assert stats[0, b, h].tolist() == want


def test_choice_of_implementation(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert implementation("select_slots", cpu) == "reference"
    assert implementation("select_slots", gpu) == "triton"
    with use("reference"):
        assert implementation("select_slots", gpu) == "reference"
    with use("triton"):
        assert implementation("select_slots", gpu) == "triton"
        with pytest.raises(ValueError, match="asked for explicitly"):
            implementation("select_slots", cpu)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert implementation("select_slots", cpu) == "triton"
    assert implementation("select_slots", cpu) == "reference"
    with pytest.raises(ValueError, match="unknown implementation"), use("cuda"):
        pass


def test_nothing_imports_triton_on_cpu():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kvpass.ops;"
        "assert not [m for m in sys.modules if m.startswith('kvpass.kernels.')], 'kernels must load lazily';"
        "c = torch.zeros(1, 1, 4, dtype=torch.int32); c[..., 0] = 1;"
        "print(torch.ops.kvpass.select_slots(torch.rand(1, 1, 3), c, 2).shape)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        lambda: select_slots(torch.zeros(1, 1, 3, dtype=torch.float64), fresh_cursor(), 2),
        lambda: select_slots(torch.zeros(1, 1, 3), fresh_cursor().long(), 2),
        lambda: score_slots(torch.zeros(2, 1, 1, 3), None, None, valid(3), fresh_cursor(), 0, ""),
        lambda: compact_slots(
            (torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), None, torch.zeros(0, 1, 1, 3)),
            torch.zeros(1, 1, 2, dtype=torch.int32), fresh_cursor(), empty_state(1, 1, 4, 16, Rule()).tensors(), "",
        ),
        lambda: join_slots(
            empty_state(1, 1, 4, 16, Rule()).tensors(), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0, ""
        ),
    ],
    ids=["dtype", "cursor", "statistics", "compact", "join"],
)  # fmt: skip
def test_refuses(call):
    with pytest.raises(ValueError, match=r"slots: "):
        call()
