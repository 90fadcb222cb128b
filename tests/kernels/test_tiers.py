"""Tokens that are demoted instead of evicted, op by op, against simulations that read every token as it is held."""

from __future__ import annotations

import pytest
import torch
from kvpass.kernels.budget import within
from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.lookup import places_of, rising, slots_at
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import TOLERANCES
from models.both_forms import KINDS, steps_in_both_forms
from models.states import builtin
from oracle.coded import Held
from oracle.codes import decoded, encoded
from oracle.ops import Site
from oracle.tiers import PlainMiKV, TieredSimulator
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

LAYERS, HEADS, KV = 2, 4, 2
INT2 = Held("int2", "int2", False, 8)


class Chat:
    """Layers of the library and of the simulation, fed the same tokens: outputs, whole tokens and slots agree after
    each call. Numbers are small multiples of 1/32, so that no code hangs on a rounding.
    """

    def __init__(
        self, policy: str, budget: float | int, held: Held = INT2, floor: int = 4, dtype: torch.dtype = torch.float32
    ) -> None:
        turn = "hadamard" if held.rotate else "none"
        spec = {"name": "mine", "extends": policy, "evicted": {"to": {"k": held.k, "v": held.v}}, "min_slots": floor,
                "store": {"rotate": turn, "group": held.group, "fit_k": held.fit_k, "fit_v": held.fit_v}}  # fmt: skip
        planned = Policy.load(spec).with_budget(budget)
        self.dtype = dtype
        self.g = torch.Generator().manual_seed(3)
        rounding = {} if dtype is torch.float32 else {"rounding": 2.0**-6}
        self.simulator = TieredSimulator(policy, budget, floor, held=held, **rounding)
        self.simulator.depth = LAYERS
        self.sites, self.held = [], held
        for index in range(LAYERS):
            projection = torch.randn(24, HEADS * 16, generator=self.g)
            self.simulator.outward[index] = projection.double().T.unflatten(0, (-1, 16))
            self.sites.append(Site(rule_of(planned, index, LAYERS), projection))
        self.past: list[tuple[Tensor, Tensor]] = []
        self.padding = torch.zeros(0, 0, dtype=torch.bool)
        self.demoted = 0

    def grid(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self.g).clamp(-3.5, 3.5) * 32).round() / 32

    def call(self, mask: Tensor) -> None:
        """mask: bool [B, S], False is padding."""
        (batch, count), start = mask.shape, self.padding.shape[1]
        self.padding = torch.cat([self.padding.view(batch, -1), mask], 1)
        causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        sees = causal & self.padding[:, None, None] & mask[:, None, :, None]
        for index, site in enumerate(self.sites):
            q = self.grid(batch, HEADS, count, 16)
            k, v = (self.grid(batch, KV, count, 16) for _ in "kv")
            k = k * (1 + torch.arange(16) % 4)  # channels of different sizes
            q, k, v = (x.to(self.dtype).float() for x in (q, k, v))
            old = self.past[index] if len(self.past) > index else (k[:, :, :0], v[:, :, :0])
            joined = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
            self.past[index : index + 1] = [joined]
            run = site.one if count == 1 and start else site.many
            got = run(*(x.to(self.dtype) for x in (q, k, v)), sees, start)
            want = self.simulator.attend(index, q, *joined, sees, 0.25)
            shown = sees.any(-1)[:, 0]  # what padding gets means nothing
            absolute, relative = TOLERANCES[self.dtype]
            for b in range(batch):
                ours, theirs = got[b][:, shown[b]].float(), want[b][:, shown[b]]
                torch.testing.assert_close(ours, theirs, rtol=relative, atol=absolute * 2)
        self.simulator.follow([site.positions() for site in self.sites])
        for index in range(LAYERS):
            self.check(index, entries=count > 1)

    def check(self, index: int, entries: bool) -> None:
        """All tokens are in slots, as many are whole as there is room for, and what is read of them is right."""
        site = self.sites[index]
        state = site.state
        assert state is not None
        read = [entries_of(state, half, site.rule) for half in ("k", "v")] if entries else []
        for b, valid in enumerate(self.padding):
            tokens = valid.nonzero().flatten().tolist()
            whole = within(site.rule, len(tokens))
            for h in range(KV):
                slots = state.pos[b, h]
                assert slots[slots >= 0].tolist() == tokens
                at = state[WHOLE_AT][b, h]
                assert (at >= 0).sum() == whole
                self.demoted += len(tokens) - whole
                if not entries:
                    continue
                for half, name, got, made in zip("kv", (self.held.k, self.held.v), read, self.past[index], strict=True):
                    if name != "dense":
                        assert not bool(state[half][b, h][at < 0].any()), "places without a token hold zeros"
                    codes = self.simulator.codes[index, half][b, h]
                    own = torch.isin(torch.tensor(tokens), at)
                    want = torch.where(own[:, None], made[b, h][tokens].double(), codes[tokens])
                    close = (
                        {"rtol": 1e-4, "atol": 1e-4} if self.dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
                    )
                    torch.testing.assert_close(got[b, h, : len(tokens)].double(), want, **close)
                    assert torch.equal(got[b, h, : len(tokens)][own].float(), made[b, h][tokens][own])

    def converse(self, turns: list[tuple[int, int]], lengths: list[int] | None = None) -> None:
        """Turns of so many tokens at once, then so many one by one; rows of the first are padded on the left."""
        lengths = lengths or [turns[0][0]] * 2
        for turn, (together, alone) in enumerate(turns):
            kept = lengths if turn == 0 else [together] * len(lengths)
            self.call(torch.stack([torch.arange(together) >= together - n for n in kept]))
            for _ in range(alone):
                self.call(torch.ones(len(lengths), 1, dtype=torch.bool))
        for index in range(LAYERS):
            self.check(index, entries=True)
        assert self.demoted > 0
        assert self.simulator.near_ties == 0, "no choice was explained by rounding"


POLICIES: dict[str, float | int] = {
    "h2o": 12, "tova": 12, "streaming_llm": 12, "roco": 14, "snapkv": 40, "pyramidkv": 40, "criticalkv": 40,
    "scissorhands": 14, "knorm": 36,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_would_evict(policy: str) -> None:
    """A prompt in a padded batch, steps, a second turn, more steps."""
    Chat(policy, POLICIES[policy]).converse([(60, 8), (9, 3)], [60, 46])


@pytest.mark.parametrize("policy", ["h2o", "roco"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_share_of_the_current_length(policy: str, share: float) -> None:
    """Forty steps: whole tokens grow in number, in slots that grow."""
    floor = 20 if policy == "roco" else 4  # it protects 14
    Chat(policy, share, floor=floor).converse([(50, 40), (20, 5)], [50, 41])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """What is whole hangs on no rounding."""
    Chat("streaming_llm", 10, dtype=dtype).converse([(30, 6), (5, 3)], [30, 22])


STORES = {
    "turned": Held("int4", "int4", True, 64),
    "two kinds": Held("int4", "int2", True, 5),
    "three bits": Held("int3", "int3", False, 8),
    "keys alone": Held("int2", "dense", False, 16),
    "values alone": Held("dense", "int2", True, 16),
    "fp8": Held("fp8_e4m3", "int8_symmetric", True, 64),
}


@pytest.mark.parametrize("store", STORES)
def test_every_way_to_hold(store: str) -> None:
    Chat("h2o", 9, STORES[store]).converse([(30, 12), (5, 4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["h2o", "tova", "roco", "snapkv", "streaming_llm", "criticalkv", "whitelist"])
def test_the_device_does_what_the_reference_does(name: str, kind: str) -> None:
    """Outputs, whole copies, statistics and codes, where nothing may be read back; the caller dropped tokens before."""
    rule = builtin()[name].replace(k_as="int4", v_as="int2", scale_group=8, rotated=True, by_score=True)
    for before, after in steps_in_both_forms(rule, kind):
        assert kind != "none" or not torch.equal(before[WHOLE_AT], after[WHOLE_AT])


def test_a_cache_that_begins_small() -> None:
    """All tokens are whole until there are too many; a row begins with a step."""
    chat = Chat("h2o", 6)
    chat.call(torch.tensor([[False, True, True], [False, False, False]]))
    for row in ([1, 0], [1, 1], [0, 1], *[[1, 1]] * 8, [0, 1], [1, 0], [1, 1]):
        chat.call(torch.tensor(row, dtype=torch.bool)[:, None])
    chat.call(torch.tensor([[True, False, True, False, True], [False, False, True, True, True]]))
    for row in ([1, 1], [0, 1], [1, 1], [1, 0]):
        chat.call(torch.tensor(row, dtype=torch.bool)[:, None])
    assert chat.simulator.near_ties == 0


def test_a_prompt_in_chunks() -> None:
    chat = Chat("h2o", 0.25)
    for _ in range(5):
        chat.call(torch.ones(2, 17, dtype=torch.bool))
    chat.converse([(3, 2)])


def test_the_simulation_tells_them_apart() -> None:
    """One token more or less that is whole, or codes of another kind, show."""
    for change in ({"group": 16}, {"k": "int3"}, {"rotate": True}):
        chat = Chat("h2o", 12)
        chat.simulator.held = Held(**{**vars(INT2), **change})
        with pytest.raises(AssertionError):
            chat.converse([(40, 8)])
    chat = Chat("h2o", 12)
    chat.simulator.budget = type(chat.simulator.budget).of(13)
    with pytest.raises(AssertionError):
        chat.converse([(40, 8)])


def test_demotion_is_for_good() -> None:
    """A whole token was always whole, and a code is what it was when its token came."""
    chat = Chat("h2o", 10)
    chat.call(torch.ones(2, 30, dtype=torch.bool))
    state = chat.sites[0].state
    assert state is not None
    codes, before = state["k_codes"][:, :, :30].clone(), state[WHOLE_AT].clone()
    for step in range(12):
        chat.call(torch.ones(2, 1, dtype=torch.bool))
        state = chat.sites[0].state
        now = state[WHOLE_AT]
        for one, old in zip(now.flatten(0, 1), before.flatten(0, 1), strict=True):
            assert set(one.tolist()) - {-1} <= (set(old.tolist()) | {30 + step})
        before = now.clone()
    chat.call(torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(chat.sites[0].state["k_codes"][:, :, :30], codes)


@pytest.mark.parametrize(
    "held",
    [Held("int4", "int4", False, 8, fit_k="balance"), Held("int2", "ternary", False, 8, fit_k="range", fit_v="range")],
)
def test_codes_that_are_fitted(held: Held) -> None:
    """MiKV's balancer, and ranges: of codes alone, whole tokens are as they are."""
    chat = Chat("h2o", 0.3, held)
    chat.converse([(40, 12), (7, 4)], [40, 27])
    assert chat.demoted > 100


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_mikv_in_plain_loops(name: str) -> None:
    """The preset without its balancer, one head of 8: groups of 4, a fifth of the current length."""
    g, share = torch.Generator().manual_seed(1), 0.2
    spec = {"name": "mine", "extends": "mikv", "evicted": {"to": name}, "store": {"group": 4, "fit_k": "none"}}
    site = Site(rule_of(Policy.load(spec).with_budget(None)), torch.empty(0), (8, 8))
    plain = PlainMiKV(share, name, 4)
    tokens = 0
    for count in (25, *[1] * 40, 8, *[1] * 5):
        q, k, v = ((torch.randn(1, 1, count, 8, generator=g) * 16).round() / 16 for _ in "qkv")
        mask = torch.ones(count, tokens + count, dtype=torch.bool).tril(tokens)[None, None]
        got = (site.one if count == 1 else site.many)(q, k, v, mask, tokens)
        want = plain.call(*(x[0, 0].tolist() for x in (q, k, v)))
        torch.testing.assert_close(got[0, 0].double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=2e-5)
        tokens += count
        assert set(site.positions().flatten().tolist()) - {-1} == plain.whole
    assert len(plain.whole) == tokens // 5


def test_mikv_says_what_the_paper_says() -> None:
    """Two groups a head, a share of the current length, the balancer, RTN between the lowest and the highest entry."""
    rule = rule_of(Policy.load("mikv").with_budget(None))
    assert rule[Storage] == Storage("int2", "int2", 32, by_score=True, k_fit="balance")
    assert [within(rule, seen) for seen in (1, 9, 10, 99, 1000)] == [1, 1, 2, 19, 200]
    codes = encoded([0.5, 4.0, 1.0, 2.5], "int2", 4)
    assert codes["codes"] == [0, 3, 0, 2]
    assert decoded(codes, "int2", 4) == pytest.approx([0.5, 4.0, 0.5, 0.5 + 2 * 3.5 / 3], abs=1e-3)


def test_places_and_slots() -> None:
    pos = torch.tensor([[2, 3, 7, 9, -1, -1], [0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    at = torch.tensor([[9, -1, 3], [5, 0, -1]], dtype=torch.int32)
    place, there = places_of(at, rising(pos))
    assert there.tolist() == [[False, True, False, True, False, False], [True, False, False, False, False, True]]
    assert place[there].tolist() == [2, 0, 1, 0]
    for part in (slice(0, 2), slice(1, 2)):
        slot = slots_at(at[part], rising(pos[part]))
        assert slot[at[part] >= 0].tolist() == [3, 1, 5, 0][2 * part.start :]


def test_a_full_head_is_an_error() -> None:
    chat = Chat("h2o", 6)
    chat.call(torch.ones(2, 10, dtype=torch.bool))
    site = chat.sites[0]
    assert site.state is not None
    site.state[WHOLE_AT].copy_(torch.arange(site.state.places))
    with pytest.raises(RuntimeError, match="no place for the token's whole copy"):
        site.one(*(torch.randn(2, n, 1, 16) for n in (HEADS, KV, KV)), torch.ones(2, 1, 1, 11, dtype=torch.bool), 10)


def test_fields() -> None:
    """Codes for all, copies for some; nothing else has a copy's width."""
    rule = Rule(stats=("sum",), score="sum", slots=4, k_as="int2", v_as="int2", scale_group=8, by_score=True)
    state = State.empty(rule, torch.empty(0), B=2, H=3, C=50, W=5, D=16, V=24)
    assert state.places == 5
    assert tuple(state.k.shape) == (2, 3, 5, 16)
    assert tuple(state["v_codes"].shape) == (2, 3, 50, 6)
    assert rule.demotes
    assert rule.evicts
    assert not rule.drops
