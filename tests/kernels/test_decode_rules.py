"""The whole chain, prefill and then token by token, against a simulation that keeps plain Python lists of tokens."""

import math

import pytest
import torch
from kvpass.kernels.attention.observation import Observation
from kvpass.kernels.budget import budget, kept
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.criterion import Ranking, Scope
from kvpass.kernels.rank.places import Protected
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rank.smooth import Pool
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.cursor import FREE, LIVE, SEEN
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import assert_close, bits, empty_state, qkv

BUDGET = {"num": 1, "den": 2, "floor": 4}
RULES = {
    "h2o": Rule(stats=("sum",), queries=-1, decode="add", score="sum", recent_num=1, recent_den=2, **BUDGET),
    "h2o slots": Rule(stats=("sum",), queries=-1, group="max", decode="add", score="sum", recent=1, slots=9),
    "tova": Rule(stats=("sum",), queries=1, carry=False, decode="replace", score="sum", heads="all", **BUDGET),
    "streaming": Rule(score="position", sinks=4, **BUDGET),
    "streaming slots": Rule(score="position", sinks=4, slots=11),
    "snapkv": Rule(
        stats=("sum", "count"), queries=32, carry=False, decode="add", score="mean", pool="max", pool_size=7,
        recent=32, num=3, den=4, floor=34,
    ),
    "snapkv small": Rule(
        stats=("sum", "count"), queries=4, carry=False, decode="add", score="mean", pool="avg", pool_size=3,
        recent=4, **BUDGET,
    ),
    "roco": Rule(
        stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="mean", scope_num=3, scope_den=10, sinks=4,
        recent=10, num=3, den=4, floor=15,
    ),
    "prefill only": Rule(stats=("sum",), queries=5, decode="none", score="sum", **BUDGET),
    "full": Rule(),
    "full with statistics": Rule(stats=("sum", "sumsq", "count"), queries=-1, decode="add", score="sum"),
}  # fmt: skip
"""Budgets hold what is protected, as those of policies are checked to."""
OBSERVE = {"sum": lambda a: a, "sumsq": lambda a: a * a, "count": lambda a: 1.0}


class Simulation:
    """Tokens of one (batch row, KV head) group as dicts; every number is float64; no tensor of slots anywhere."""

    def __init__(self, rule, kv_heads, scale):
        self.rule, self.scale = rule, scale
        self.heads = [[] for _ in range(kv_heads)]
        self.seen, self.first = 0, None

    def attend(self, h, q, keys, shown):
        """Output and reduced row of one query [G, D] of head h over tokens `keys`."""
        k = torch.stack([t["k"] for t in keys])
        v = torch.stack([t["v"] for t in keys])
        logits = (q @ k.T * self.scale).masked_fill(~torch.tensor(shown), -math.inf)
        probs = logits.softmax(-1)
        return probs @ v, probs.mean(0) if self.rule[Observation].group == "mean" else probs.amax(0)

    def budget(self):
        return budget(self.rule, self.seen)

    def priority(self, h, end):
        """Tokens of head h from the best to keep to the first to go."""
        rule, n = self.rule, self.budget()
        recent = rule[Protected].recent + n * rule[Protected].recent_num // rule[Protected].recent_den
        scores = []
        for i, t in enumerate(self.heads[h]):
            same = [head[i] for head in self.heads] if rule[Ranking].heads == "all" else [t]
            scores.append(sum(self.score(s) for s in same) / len(same))
        safe = [t["number"] >= end - recent or t["number"] < rule[Protected].sinks for t in self.heads[h]]
        kept = [False] * len(scores)
        if rule[Scope].scope_num:
            spread = [math.inf if s else self.spread(t) for s, t in zip(safe, self.heads[h], strict=True)]
            order = sorted(range(len(spread)), key=lambda i: (-spread[i], self.heads[h][i]["pos"]))
            for i in order[: n * rule[Scope].scope_num // rule[Scope].scope_den + 1]:
                kept[i] = True
        rank = [(-2 if s else -1 if u else 0) for s, u in zip(safe, kept, strict=True)]
        order = sorted(
            range(len(scores)),
            key=lambda i: (rank[i], 0.0 if rank[i] else -scores[i], self.heads[h][i]["pos"]),
        )
        return [self.heads[h][i] for i in order]

    def score(self, token):
        if self.rule[Ranking].score == "position":
            return float(token["pos"])
        return token["sum"] / (max(token["count"], 1) if self.rule[Ranking].score == "mean" else 1)

    def spread(self, token):
        n = max(token["count"], 1)
        return math.sqrt(max(token["sumsq"] / n - (token["sum"] / n) ** 2, 0.0))

    def shrink(self, end):
        """Drop what exceeds the budget, all heads at once (scores must not see a half-shrunk layer)."""
        keep = [sorted(self.priority(h, end)[: self.budget()], key=lambda t: t["pos"]) for h in range(len(self.heads))]
        self.heads = keep

    def call(self, q, k, v, position, visible):
        """q [Hq, S, D], k, v [Hkv, S, D]; visible(i, p): may query i see position p. Returns out [Hq, S, D]."""
        rule, (heads, queries) = self.rule, q.shape[:2]
        group = heads // len(self.heads)
        valid = [any(visible(i, position + s) for i in range(queries)) for s in range(queries)]
        single, out = queries == 1, torch.zeros(heads, queries, v.shape[-1], dtype=torch.float64)
        if single and not valid[0]:
            for h, tokens in enumerate(self.heads):
                if tokens and any(visible(0, t["pos"]) for t in tokens):
                    rows = slice(h * group, (h + 1) * group)
                    out[rows, 0] = self.attend(h, q[rows, 0], tokens, [visible(0, t["pos"]) for t in tokens])[0]
            return out
        fresh = []
        for h in range(len(self.heads)):
            new = [{"pos": position + s, "k": k[h, s], "v": v[h, s]} for s in range(queries) if valid[s]]
            for number, t in enumerate(new, self.seen):
                t.update(number=number, sum=0.0, sumsq=0.0, count=0.0)
            self.heads[h].extend(new)
            fresh.append({id(t): dict.fromkeys(rule[Statistics].stats, 0.0) for t in self.heads[h]})
        observing = [s for s in range(queries) if valid[s]]
        if not single and rule[Observation].queries >= 0:
            observing = observing[max(len(observing) - rule[Observation].queries, 0) :]
        for h, tokens in enumerate(self.heads):
            rows = slice(h * group, (h + 1) * group)
            for i in range(queries):
                shown = [visible(i, t["pos"]) for t in tokens]
                if not any(shown):
                    continue
                out[rows, i], row = self.attend(h, q[rows, i], tokens, shown)
                if i in observing:
                    for t, a, s in zip(tokens, row.tolist(), shown, strict=True):
                        for name in rule[Statistics].stats:
                            fresh[h][id(t)][name] += OBSERVE[name](a) * s
        self.merge(fresh, single)
        self.seen += sum(valid)
        if self.first is None and any(valid):
            self.first = position + valid.index(True)
        end = self.seen
        if rule[Pool].pool != "none" and not single:
            self.pool(end)
        if rule.evicts:
            self.shrink(end)
        return out

    def merge(self, fresh, single):
        mode = self.rule[Observation].decode if single else "add" if self.rule[Observation].carry else "replace"
        for tokens, new in zip(self.heads, fresh, strict=True):
            for t in tokens:
                for name, value in new[id(t)].items():
                    t[name] = t[name] + value if mode == "add" else value if mode == "replace" else t[name]

    def pool(self, end):
        rule, half = self.rule, self.rule[Pool].pool_size // 2
        for tokens in self.heads:
            inside = [t["number"] < end - max(rule[Observation].queries, 0) for t in tokens]
            raw = [t["sum"] if ok else 0.0 for t, ok in zip(tokens, inside, strict=True)]
            padded = [0.0] * half + raw + [0.0] * half
            for i, t in enumerate(tokens):
                if inside[i]:
                    window = padded[i : i + rule[Pool].pool_size]
                    t["sum"] = max(window) if rule[Pool].pool == "max" else sum(window) / rule[Pool].pool_size


class Site:
    """One site driven through the ops as lowering drives it."""

    def __init__(self, rule, batch, kv_heads, slots, dim, scale, dtype=torch.float32):
        self.rule, self.scale = rule, scale
        self.state = empty_state(batch, kv_heads, slots, dim, rule, dtype=dtype)
        self.position = 0

    def call(self, q, k, v, mask):
        s, code = self.state, self.rule.encode()
        sentinels = [bits(t) for t in (s.k, s.v)]
        if q.shape[2] == 1:
            before = s.cursor[..., LIVE].clone()
            out = decode_attend(q, k, v, mask, s.tensors(), self.position, self.scale, code)
        else:
            past = None
            pos = None
            if self.position:
                k, v, pos, past = join_slots(s.tensors(), k, v, self.position, code)
            causal = mask is None and pos is None
            out, stats, valid = prefill_attend(
                q, k, v, pos, mask, self.scale, "causal" * causal, code, position=self.position
            )
            score, stats, cursor = score_slots(stats, past, pos, valid, s.cursor, self.position, code, mask=mask)
            idx = select_slots(score, cursor, s.pos.shape[-1])
            before = cursor[..., LIVE].clone()
            compact_slots((k, v, pos, stats), idx, cursor, s.tensors(), code)
        beyond = torch.arange(s.pos.shape[-1]) > before[..., None]
        for t, old in zip((s.k, s.v), sentinels, strict=True):
            assert torch.equal(bits(t)[beyond], old[beyond]), "a slot beyond LIVE was written"
        self.position += q.shape[2]
        return out


def compare(site, simulations, rule):
    """Positions, contents, statistics and cursor of every head."""
    state, used = site.state, site.state.used()
    assert (state.pos[~used] == -1).all()
    for b, sim in enumerate(simulations):
        for h, tokens in enumerate(sim.heads):
            live, free, seen, first = state.cursor[b, h].tolist()
            assert (live, seen, first) == (len(tokens), sim.seen, -1 if sim.first is None else sim.first)
            assert live <= (budget(rule, seen) if rule.evicts else seen)
            assert 0 <= free <= live
            here = used[b, h].nonzero().flatten()
            order = here[state.pos[b, h, here].argsort()]
            tokens = sorted(tokens, key=lambda t: t["pos"])
            assert state.pos[b, h, order].tolist() == [t["pos"] for t in tokens]
            for slot, t in zip(order.tolist(), tokens, strict=True):
                assert torch.equal(state.k[b, h, slot].double(), t["k"])
                assert torch.equal(state.v[b, h, slot].double(), t["v"])
            for i, name in enumerate(rule[Statistics].stats):
                want = torch.tensor([t[name] for t in tokens], dtype=torch.float64)
                assert_close(state.stats[i, b, h, order], want, stats=True, what=name)


def drive(rule, calls, pads, *, heads=4, kv_heads=2, dim=16, check_every=1):
    """Run calls (numbers of tokens) through ops and simulation. pads: per row, positions hidden from everyone."""
    batch, total = len(pads), sum(calls)
    q, k, v = qkv(batch, heads, kv_heads, total, dim, seed=3)
    q = q * 2  # sharper rows: scores differ by more than rounding
    slots = (kept(rule, total) if rule.evicts else total) + 3
    site = Site(rule, batch, kv_heads, slots, dim, 0.25)
    simulations = [Simulation(rule, kv_heads, 0.25) for _ in range(batch)]
    start = 0
    for number, size in enumerate(calls):
        now = slice(start, start + size)
        mask = torch.arange(total) <= torch.arange(start, start + size)[:, None]
        mask = mask.expand(batch, 1, size, total).clone()
        for b, hidden in enumerate(pads):
            mask[b, :, :, list(hidden)] = False
        given = None if not any(pads) and (size == 1 or not start) else mask[..., : start + size]
        out = site.call(q[:, :, now], k[:, :, now], v[:, :, now], given)
        assert not out.isnan().any()
        for b, sim in enumerate(simulations):
            want = sim.call(
                q[b, :, now].double(), k[b, :, now].double(), v[b, :, now].double(), start,
                lambda i, p, m=mask[b, 0]: bool(m[i, p]),
            )  # fmt: skip
            blind = torch.tensor([not mask[b, 0, i].any() for i in range(size)])
            assert_close(out[b, :, ~blind], want[:, ~blind], torch.float32, what=f"out of call {number}")
        if number % check_every == 0 or number == len(calls) - 1:
            compare(site, simulations, rule)
        start += size
    return site


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize(
    ("calls", "pads"),
    [
        ([50] + [1] * 30, [(), ()]),
        ([40] + [1] * 25, [(), range(9), range(31)]),
        ([37] + [1] * 12, [range(30, 37), ()]),
        ([20, 1, 1, 9, 1, 1, 1, 17, 1, 1], [(), range(5)]),
        ([1] * 24, [()]),
    ],
    ids=["even", "left padded", "right padded", "extends", "from nothing"],
)
def test_chain_equals_simulation(name, calls, pads):
    drive(RULES[name], calls, pads)


@pytest.mark.parametrize("name", ["h2o", "tova", "roco", "streaming"])
def test_pad_tokens_between_and_while_decoding(name):
    drive(RULES[name], [12] + [1] * 14, [(), (3, 4, 15, 20), (13, 14, 25)])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (16, 1), (12, 4)])
def test_chain_for_groups(heads, kv_heads):
    drive(RULES["roco"], [30] + [1] * 8, [(), range(3)], heads=heads, kv_heads=kv_heads, check_every=4)


@pytest.mark.parametrize("name", ["full", "full with statistics"])
def test_full_budget_stepwise_equals_one_prefill(name):
    rule = RULES[name]
    q, k, v = qkv(2, 4, 2, 40, 32)
    want, stats, _ = prefill_attend(q, k, v, None, None, 0.2, "causal", rule.encode())
    site = Site(rule, 2, 2, 41, 32, 0.2)
    got = [site.call(q[:, :, :25], k[:, :, :25], v[:, :, :25], None)]
    for t in range(25, 40):
        one = slice(t, t + 1)
        got.append(site.call(q[:, :, one], k[:, :, one], v[:, :, one], None))
    assert_close(torch.cat(got, 2), want, what="out")
    assert_close(site.state.stats[..., :40], stats, stats=True, what="stats")
    assert (site.state.cursor == torch.tensor([40, 40, 40, 0])).all()


def test_budget_is_never_exceeded_and_holes_are_reused():
    site = drive(RULES["h2o slots"], [30] + [1] * 40, [()], check_every=10)
    assert (site.state.cursor[..., LIVE] == 9).all()
    assert (site.state.cursor[..., FREE] < 10).all()
    assert (site.state.cursor[..., SEEN] == 70).all()
