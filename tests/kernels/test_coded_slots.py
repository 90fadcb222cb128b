"""Slots that hold codes, op by op, against a simulation that holds every token and reads it as its codes say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpass.kernels import choose
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.codecs.storage import coded
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import TOLERANCES, assert_close, qkv
from models.both_forms import KINDS, steps_in_both_forms
from models.states import builtin, state_under
from models.unread import HostRead, unread
from oracle.coded import CodedSimulator, Held
from oracle.ops import Site, after_call
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

LAYERS, SEEN = 2, 240
INT4 = Held("int4", "int4", True, 16, 8, 3)


class Chat:
    """Layers of the library and of the simulation, fed the same tokens; each call's outputs and positions agree.

    Keys and values are small multiples of 1/32, so that their rotation is exact and no code hangs on a rounding.
    """

    def __init__(
        self,
        policy: str,
        budget: float | int,
        held: Held,
        *,
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
        site: Callable[..., Site] = Site,
    ) -> None:
        spec = {"name": "mine", "extends": policy, "store": held.spec, "min_slots": 16}
        planned = Policy.load(spec).with_budget(None if policy == "full" else budget)
        self.g = torch.Generator().manual_seed(3)
        self.heads, self.dims, self.dtype, self.tokens = heads, dims, dtype, 0
        rounding = {} if dtype is torch.float32 else {"rounding": 2.0**-6}
        self.simulator = CodedSimulator(policy, budget, 16, held=held, **rounding)
        self.simulator.depth = LAYERS
        self.simulator.angles = 0.7 ** torch.arange(1, dims[0] // 2 + 1, dtype=torch.float64)
        self.sites = []
        for index in range(LAYERS):
            projection = torch.randn(24, heads[0] * dims[1], generator=self.g)
            self.simulator.outward[index] = projection.double().T.unflatten(0, (-1, dims[1]))
            self.sites.append(site(rule_of(planned, index, LAYERS), projection, dims))
        self.past: list[tuple[Tensor, Tensor]] = []
        self.padding: Tensor | None = None

    def grid(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self.g).clamp(-3.5, 3.5) * 32).round() / 32

    def call(self, mask: Tensor) -> None:
        """mask: bool [B, S], False is padding."""
        batch, count = mask.shape
        self.padding = mask if self.padding is None else torch.cat([self.padding, mask], 1)
        total = self.tokens + count
        causal = torch.ones(count, total, dtype=torch.bool).tril(self.tokens)
        sees = causal & self.padding[:, None, None] & mask[:, None, :, None]
        for index, site in enumerate(self.sites):
            q = self.grid(batch, self.heads[0], count, self.dims[0])
            k, v = (self.grid(batch, self.heads[1], count, dim) for dim in self.dims)
            k = k * (1 + torch.arange(self.dims[0]) % 4)  # channels of different sizes
            old = self.past[index] if len(self.past) > index else (k[:, :, :0], v[:, :, :0])
            joined = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
            self.past[index : index + 1] = [joined]
            run = site.one if count == 1 and self.tokens else site.many
            got = run(*(x.to(self.dtype) for x in (q, k, v)), sees, self.tokens)
            want = self.simulator.attend(index, q, *joined, sees, self.dims[0] ** -0.5)
            absolute, relative = TOLERANCES[self.dtype]
            shown = sees.any(-1)[:, 0]  # what padding gets means nothing
            for b in range(batch):
                ours, theirs = got[b][:, shown[b]].float(), want[b][:, shown[b]]
                torch.testing.assert_close(ours, theirs, rtol=relative, atol=absolute * 2)
        after_call(self.sites, count > 1 or not self.tokens, self.simulator.angles)
        self.tokens = total
        self.simulator.follow([site.positions() for site in self.sites])

    def converse(self, turns: list[tuple[int, int]], lengths: list[int] | None = None) -> None:
        """Turns of so many tokens at once, then so many one by one; rows of the first are padded on the left to
        `lengths`."""
        lengths = lengths or [turns[0][0]] * 2
        for turn, (together, alone) in enumerate(turns):
            kept = lengths if turn == 0 else [together] * len(lengths)
            self.call(torch.stack([torch.arange(together) >= together - n for n in kept]))
            for _ in range(alone):
                self.call(torch.ones(len(lengths), 1, dtype=torch.bool))


def exactly(chat: Chat) -> None:
    """No choice was explained by rounding."""
    assert chat.simulator.near_ties == 0


STORES = {
    "int8": Held("int8", "int8", False, 64, 8, 3),
    "int4 turned": INT4,
    "int2, all codes": Held("int2", "int2", True, 5, 0, 0),
    "keys alone": Held("int4", "dense", True, 16, 6, 0),
    "values alone": Held("dense", "int2", True, 16, 0, 2),
    "two kinds": Held("int8_symmetric", "int4", False, 4, 9, 4),
    "fp8": Held("fp8_e4m3", "fp8_e5m2", True, 64, 3, 1),
    "normal levels": Held("turbo3", "turbo2", True, 64, 3, 1),
    "symmetric": Held("int4_symmetric", "int8_symmetric", True, 8, 1, 0),
    "whole for longer than it is kept": Held("int4", "int4", True, 16, 60, 2),
}
TURNED = ["streaming_llm_reindexed", "cascading"]
"""Kept keys are turned after calls, so only values may be codes."""
POLICIES: dict[str, Any] = {
    "full": 1.0,
    "h2o": 24,
    "tova": 24,
    "streaming_llm": 24,
    "roco": 24,
    "snapkv": 40,
    "pyramidkv": 40,
    "criticalkv": 40,
    "ada_snapkv": 40,
    "critical_ada": 40,
    "layer_defensivekv": 40,
    "knorm": 40,
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("policy", ["full", "h2o", "ada_snapkv"])
def test_every_way_to_hold(policy: str, store: str) -> None:
    """A prompt, steps with evictions or growth, a second turn shorter than the residual, more steps."""
    chat = Chat(policy, POLICIES[policy], STORES[store])
    chat.converse([(50, 14), (5, 4), (20, 3)])
    exactly(chat)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_way_to_evict(policy: str) -> None:
    """Rows that are padded on the left; budgets by fraction grow."""
    chat = Chat(policy, POLICIES[policy], INT4)
    chat.converse([(60, 12), (9, 3)], [60, 41, 7])
    exactly(chat)


@pytest.mark.parametrize("policy", TURNED)
def test_turned_keys_beside_coded_values(policy: str) -> None:
    chat = Chat(policy, 16, STORES["values alone"])
    chat.converse([(40, 12), (9, 3)], [40, 31])
    exactly(chat)


@pytest.mark.parametrize("policy", ["h2o", "roco"])
def test_a_fraction_grows(policy: str) -> None:
    chat = Chat(policy, 0.5, INT4)
    chat.converse([(80, 30), (7, 5)], [80, 70])
    exactly(chat)


@pytest.mark.parametrize("dims", [(80, 80), (5, 3), (24, 16), (12, 40)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_shapes(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    for held in (INT4, Held("int8", "int2", False, 7, 4, 2)):
        chat = Chat("h2o", 16, held, heads=heads, dims=dims)
        chat.converse([(24, 6), (3, 2)])
        exactly(chat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store", ["int8", "int4 turned", "fp8"])
def test_half_precision(store: str, dtype: torch.dtype) -> None:
    for policy in ("full", "streaming_llm"):  # what they keep hangs on no rounding
        chat = Chat(policy, POLICIES[policy], STORES[store], dtype=dtype)
        chat.converse([(40, 8), (5, 3)], [40, 28])
        exactly(chat)


def test_padding_everywhere() -> None:
    """Rows that begin late, also with a step; pads between tokens and in steps, in either row."""
    for held in (INT4, Held("int4", "int4", True, 16, 0, 3), Held("int4", "int4", True, 16, 5, 0)):
        chat = Chat("h2o", 12, held)
        chat.call(torch.tensor([[False] * 6 + [True] * 14, [False] * 20]))
        for row in ([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], *[[1, 1]] * 6, [0, 1], [0, 1], [1, 1], [1, 0], [1, 1]):
            chat.call(torch.tensor(row, dtype=torch.bool)[:, None])
        chat.call(torch.tensor([[True, False, True, False, True], [False, False, True, True, True]]))
        for row in ([1, 1], [0, 1], [1, 1], [1, 1], [1, 1]):
            chat.call(torch.tensor(row, dtype=torch.bool)[:, None])
        exactly(chat)


def test_the_simulation_tells_them_apart() -> None:
    """Each number of what is held shows in the outputs: with another one the two disagree."""
    for other in (
        Held("int4", "int4", True, 16, 7, 3),
        Held("int4", "int4", True, 16, 8, 2),
        Held("int4", "int4", True, 8, 8, 3),
        Held("int4", "int4", False, 16, 8, 3),
        Held("int4", "int8", True, 16, 8, 3),
    ):
        chat = Chat("h2o", 24, INT4)
        chat.simulator.held = other
        with pytest.raises(AssertionError):
            chat.converse([(50, 14)])


def test_what_slots_hold_is_codes() -> None:
    """No tensor of the state has room for the tokens in full."""
    chat = Chat("full", 1.0, INT4)
    chat.converse([(50, 3)])
    state = chat.sites[0].state
    assert state is not None
    assert coded(chat.sites[0].rule) == ("k", "v")
    assert state.k.shape[2] == state.v.shape[2] == 11
    assert {name: tuple(state[name].shape[2:]) for name in ("k_codes", "k_scale", "k_low")} == {
        "k_codes": (state.slots, 8), "k_scale": (state.slots, 1), "k_low": (state.slots, 1)
    }  # fmt: skip


FITTED = {
    "balance": Held("int4", "int4", True, 16, 8, 3, "balance"),
    "ranges": Held("int2", "int4", False, 8, 8, 3, "range", "range"),
    "channels": Held("float16", "dense", False, 64, 8, 0, "channels"),
    "channels, all codes": Held("int4", "int8", False, 4, 0, 0, "channels"),
    "spread": Held("mixed_2_1", "ternary", False, 8, 8, 0, "spread", "range"),
    "atoms": Held("csr4", "csr8", False, 64, 8, 2, "atoms", "atoms"),
}
RULES = {
    **{f"h2o, {name}": (builtin()["h2o"], held) for name, held in FITTED.items()},
    **{f"ada_snapkv, {name}": (builtin()["ada_snapkv"], held) for name, held in FITTED.items()},
    **{f"h2o, {name}": (builtin()["h2o"], held) for name, held in STORES.items()},
    **{name: (builtin()[name], INT4) for name in ("full", "snapkv", "roco", "streaming_llm")},
    **{name: (builtin()[name], INT4) for name in ("ada_snapkv", "layer_defensivekv", "nacl", "tova")},
    "cascading": (builtin()["cascading"], STORES["values alone"]),
}


def stored(rule: Rule, held: Held) -> Rule:
    words: dict[str, Any] = {
        "scale_group": held.group,
        "rotated": held.rotate,
        "residual": held.residual,
        "whole_sinks": held.sinks,
    }
    if held.fit_k == "channels":
        words |= {"kept_num": 3, "kept_den": 5}
    if held.fit_k == "atoms":
        words["atoms"] = 20
    return rule.replace(k_as=held.k, v_as=held.v, k_fit=held.fit_k, v_fit=held.fit_v, **words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_the_device_does_what_the_reference_does(name: str, kind: str) -> None:
    """Outputs, positions, codes and whole copies, where nothing may be read back."""
    assert len([*steps_in_both_forms(stored(*RULES[name]), kind)]) == 4


def test_a_device_that_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpass.kernels.decode_attend import device

    whole = device.hold_whole

    def read(token: Token, *args: Any) -> None:
        assert bool((token.k == token.k).all())
        whole(token, *args)

    monkeypatch.setattr(device, "hold_whole", read)
    rule = stored(*RULES["full"])
    token, call = Token(*qkv(2, 4, 2, 1, 16, keys=1)), Call.of_step(None, SEEN, Softmax(0.3), rule)
    with pytest.raises(HostRead), unread():
        decode_attend_device(token, state_under(rule, SEEN), call)


def cuda_runs(rule: Rule, dim: int = 16) -> Callable[..., Any]:
    given = Token(*qkv(2, 4, 2, 1, dim, keys=1)), state_under(rule, SEEN, dim), Call(None, SEEN, Softmax(0.3), rule)
    return choose.kernel("decode_attend", torch.device("cuda"), *given)


def test_cuda_runs_what_knows_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, but for rings, fits, codecs that they were not told of, groups that spread too wide."""
    pytest.importorskip("triton", reason="triton is not installed")
    from kvpass.kernels.decode_attend import triton, triton_stored

    for name, (rule, held) in RULES.items():
        plain = name != "cascading" and (held.fit_k, held.fit_v) == ("none", "none")
        expected = triton.decode_attend_triton if plain else decode_attend_device
        assert cuda_runs(stored(rule, held)) is expected, name
    odd = stored(builtin()["full"], Held("int4", "int4", True, 5, 8, 3))
    assert cuda_runs(odd, 80) is triton.decode_attend_triton
    assert cuda_runs(odd, 256) is decode_attend_device
    monkeypatch.delitem(triton_stored.READ, "int4")
    assert cuda_runs(stored(builtin()["full"], INT4)) is decode_attend_device


def first_steps(device: bool, held: Held) -> list[Tensor]:
    """Rows that begin with steps, one of them with a pad first."""
    rule = stored(builtin()["full"], held)
    state = State.empty(rule, torch.empty(0), B=2, H=2, C=8, D=16, V=16)
    outs = []
    for position in range(5):
        token = Token(*qkv(2, 4, 2, 1, 16, keys=1, seed=position))
        tokens = torch.ones(2, position + 1, dtype=torch.bool)
        tokens[1, :2] = False
        call = Call.of_step(None, position, Softmax(0.3), rule, tokens=tokens)
        run = decode_attend_device if device else decode_attend_reference
        out = run(token, state, call)
        outs.append(out if position >= 2 else out[:1])
    return outs


@pytest.mark.parametrize("residual", [0, 2])
@pytest.mark.parametrize("device", [False, True], ids=["reference", "device"])
def test_rows_that_begin_with_steps(device: bool, residual: int) -> None:
    """As long as all tokens are whole, nothing is lost: what codes would say never shows."""
    held = Held("int2", "int2", True, 64, residual, 5)
    for got, want in zip(first_steps(device, held), first_steps(False, Held()), strict=True):
        assert_close(got, want, what="out")
