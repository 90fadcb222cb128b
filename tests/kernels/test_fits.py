"""Codes that hang on fits of heads: the fits themselves, and op by op against a simulation that reads every token as
its code says.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.codecs.fits import Fit
from kvpass.kernels.codecs.fitting import fitted
from kvpass.kernels.codecs.fourier import real_fourier
from kvpass.kernels.codecs.storage import Storage, fit_fields
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from kvpass.kernels.testing import TOLERANCES
from oracle import fits
from oracle.coded import CodedSimulator, Held
from oracle.ops import Site
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy

KINDS = ["balance", "range", "channels", "spread"]


def some(*shape: int, seed: int = 0) -> Tensor:
    """Channels of different sizes and offsets."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * (1 + torch.arange(shape[-1]) % 5) + torch.arange(shape[-1]) % 3


@pytest.mark.parametrize("width", [16, 5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_fits_are_those_of_plain_python(kind: str, width: int) -> None:
    """Two rows, one padded in the middle; two KV heads of three query heads; more queries than the window has."""
    q, k = some(2, 6, 45, width, seed=1), some(2, 2, 45, width)
    k[0, 1, :, 0] = 3.0  # a channel that stands still
    valid = torch.ones(2, 45, dtype=torch.bool)
    valid[1, :5] = valid[1, 20:23] = False
    kept = max(width * 3 // 5, 1)
    found = fitted(kind, q, k, valid, kept)
    for b, row in enumerate(valid):
        for h in range(2):
            asked = q[b, 3 * h : 3 * h + 3, row].tolist()
            want = fits.fit_of(kind, asked, k[b, h, row].tolist(), kept / width)
            own = {part: x[b, h] for part, x in found.items()}
            assert own.get("order", torch.empty(0)).tolist() == want.picks
            close = {"rtol": 1e-6, "atol": 1e-6} if kind == "spread" else {"rtol": 3e-7, "atol": 0.0}
            for part, numbers in (("center", want.centers), ("unit", want.units)):
                torch.testing.assert_close(own.get(part, torch.empty(0)), torch.tensor(numbers), **close)


def test_a_hand_vector() -> None:
    """policies-2.md S6: max |q| [4, 1], max |k| [1, 4] -> b [2, 0.5]; q k is 8 before and after."""
    q, k = torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 4.0]])
    made = fitted("balance", q[None, None], k[None, None], torch.ones(1, 1, dtype=torch.bool), 2)
    fit = Fit(2, unit=made["unit"][0, 0])
    assert (1 / made["unit"]).flatten().tolist() == [2.0, 0.5]
    assert fit.entered(k).tolist() == fit.asked(q)[0].tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 64])
def test_frequencies_are_a_rotation(size: int) -> None:
    """As torch's own transform of real numbers, scaled."""
    assert fits.orthonormal(size)
    matrix = real_fourier(size, torch.empty(0))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.mT, torch.tensor(fits.waves(size)), rtol=0, atol=1e-6)
    x = some(4, size)
    theirs = torch.fft.rfft(x, norm="ortho")
    real = theirs.real * torch.tensor([1.0 if 2 * f in (0, size) else math.sqrt(2) for f in range(size // 2 + 1)])
    torch.testing.assert_close((x @ matrix)[:, : size // 2 + 1], real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_mixtures_stay(kind: str) -> None:
    """What queries are asked, and what is left of mixed values, are those of vectors that come back."""
    q, k, weights = some(1, 4, 9, 16, seed=2), some(1, 2, 9, 16), torch.rand(1, 2, 3, 9)
    made = fitted(kind, q, k, torch.ones(1, 9, dtype=torch.bool), 10)
    fit = Fit(16, kind == "spread", **{part: x.unsqueeze(-2) for part, x in made.items()})
    y = fit.entered(k)
    back = fit.left(y)
    torch.testing.assert_close(
        back if kind != "channels" else back[back != 0], k if kind != "channels" else k[back != 0]
    )
    asked, more = fit.asked(q[:, :2])
    products = asked @ y.mT + (0.0 if more is None else more)
    torch.testing.assert_close(products, q[:, :2] @ back.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fit.left(weights @ y, weights), weights @ back, rtol=1e-4, atol=1e-4)


def test_a_token_beyond_the_range_is_not_cut_off() -> None:
    """Ten times as far as anything in the prompt: as near as a token's own scale allows."""
    k = some(1, 1, 50, 16)
    made = fitted("range", k, k, torch.ones(1, 50, dtype=torch.bool), 16)
    fit = Fit(16, **{part: x.unsqueeze(-2) for part, x in made.items()})
    held = Held("int8", "int8", False, 16)
    rule = Rule(k_as="int8", scale_group=16)
    far = 10 * k[:, :, :1]
    codec = rule[Storage].codec_of("k")
    back = fit.left(codec.decode(codec.encode(fit.entered(far), held.group), 16, held.group))
    assert float((back - far).abs().max()) < 0.05 * float(far.abs().max())


class Chat:
    """Layers of the library and of the simulation, fed the same tokens; each call's outputs and positions agree."""

    def __init__(self, policy: str, budget: float | int, held: Held, *, heads: tuple[int, int] = (4, 2), dim: int = 16):
        spec = {"name": "mine", "extends": policy, "store": held.spec, "min_slots": 16}
        planned = Policy.load(spec).with_budget(None if policy == "full" else budget)
        self.g, self.heads, self.dim = torch.Generator().manual_seed(7), heads, dim
        self.simulator = CodedSimulator(policy, budget, 16, held=held)
        self.simulator.depth = 1
        projection = torch.randn(24, heads[0] * dim, generator=self.g)
        self.simulator.outward[0] = projection.double().T.unflatten(0, (-1, dim))
        self.site = Site(rule_of(planned, 0, 1), projection, (dim, dim))
        self.past = torch.empty(0), torch.empty(0)
        self.padding = torch.empty(0)

    def call(self, mask: Tensor) -> None:
        """mask: bool [B, S], False is padding."""
        (batch, count), first = mask.shape, not self.padding.numel()
        start = 0 if first else self.padding.shape[1]
        self.padding = mask if first else torch.cat([self.padding, mask], 1)
        sees = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        sees = sees & self.padding[:, None, None] & mask[:, None, :, None]
        q = torch.randn(batch, self.heads[0], count, self.dim, generator=self.g) / 2
        k, v = (torch.randn(batch, self.heads[1], count, self.dim, generator=self.g) for _ in range(2))
        k = k * (1 + torch.arange(self.dim) % 4) + torch.arange(self.dim) % 3
        self.past = (k, v) if first else (torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2))
        got = (self.site.one if count == 1 and not first else self.site.many)(q, k, v, sees, start)
        want = self.simulator.attend(0, q, *self.past, sees, self.dim**-0.5)
        absolute, relative = TOLERANCES[torch.float32]
        shown = sees.any(-1)[:, 0]
        for b in range(batch):
            torch.testing.assert_close(got[b][:, shown[b]], want[b][:, shown[b]], rtol=relative, atol=absolute * 2)
        self.simulator.follow([self.site.positions()])

    def converse(self, turns: list[tuple[int, int]], lengths: list[int] | None = None) -> None:
        """Turns of so many tokens at once, then so many one by one; rows of the first are padded on the left."""
        for turn, (together, alone) in enumerate(turns):
            kept = lengths if turn == 0 and lengths else [together] * 2
            self.call(torch.stack([torch.arange(together) >= together - n for n in kept]))
            for _ in range(alone):
                self.call(torch.ones(2, 1, dtype=torch.bool))
        assert self.simulator.near_ties == 0


STORES: dict[str, Held] = {
    "balance": Held("int4", "int4", False, 8, 8, 3, "balance"),
    "balance, turned": Held("int8", "dense", True, 64, 0, 0, "balance"),
    "range": Held("int2", "int2", False, 16, 6, 0, "range"),
    "ranges of both": Held("int4", "ternary", False, 5, 4, 2, "range", "range"),
    "values' ranges": Held("dense", "int4", True, 16, 4, 2, "none", "range"),
    "channels": Held("float16", "dense", False, 64, 8, 0, "channels"),
    "channels in few bits": Held("int4", "int8", False, 4, 0, 3, "channels", channels=0.8),
    "spread": Held("mixed_2_1", "ternary", False, 8, 6, 0, "spread", "range"),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("policy", "budget"), [("full", 1.0), ("h2o", 24), ("ada_snapkv", 40)])
def test_conversations(policy: str, budget: float, store: str) -> None:
    """A padded prompt, steps with evictions or growth, a second turn, more steps; ragged heads."""
    Chat(policy, budget, STORES[store]).converse([(50, 9), (5, 3)], [50, 31])


@pytest.mark.parametrize("store", ["balance", "spread"])
@pytest.mark.parametrize(("heads", "dim"), [((3, 1), 5), ((4, 4), 12)])
def test_shapes(heads: tuple[int, int], dim: int, store: str) -> None:
    Chat("h2o", 16, STORES[store], heads=heads, dim=dim).converse([(24, 5), (3, 2)])


def test_forty_steps_grow() -> None:
    Chat("h2o", 0.5, STORES["range"]).converse([(40, 40)])


@pytest.mark.parametrize("store", ["balance", "range", "channels"])
def test_rows_that_begin_late(store: str) -> None:
    """A row without a token in the first call is fitted to its own first ones; one that begins with a step has no fit:
    of channels it has the first.
    """
    chat = Chat("full", 1.0, STORES[store])
    chat.call(torch.tensor([[True] * 20, [False] * 20]))
    chat.call(torch.tensor([[True], [False]]))
    chat.call(torch.tensor([[True] * 12, [False] * 3 + [True] * 9]))
    for _ in range(10):
        chat.call(torch.tensor([[True], [True]]))


def test_fits_are_frozen() -> None:
    chat = Chat("h2o", 24, STORES["spread"])
    chat.call(torch.ones(2, 30, dtype=torch.bool))
    state: Any = chat.site.state
    before = {name: state[name].clone() for name in fit_fields(chat.site.rule)}
    assert [*before] == ["k_order", "k_center", "k_unit", "v_center", "v_unit"]
    chat.call(torch.ones(2, 1, dtype=torch.bool))
    chat.call(torch.ones(2, 9, dtype=torch.bool))
    state = chat.site.state
    assert all(torch.equal(x, state[name]) for name, x in before.items())


def test_the_simulation_tells_them_apart() -> None:
    """Each word of a fit shows in the outputs: with another one the two disagree."""
    held = Held("int4", "int4", False, 8, 8, 3, "range", "range")
    for other in (
        Held("int4", "int4", False, 8, 8, 3, "balance", "range"),
        Held("int4", "int4", False, 8, 8, 3, "none", "range"),
        Held("int4", "int4", False, 8, 8, 3, "range", "none"),
    ):
        chat = Chat("h2o", 24, held)
        chat.simulator.held = other
        with pytest.raises(AssertionError):
            chat.converse([(50, 9)])


def test_channels_that_are_not_kept_are_not_there() -> None:
    chat = Chat("full", 1.0, STORES["channels"])
    chat.converse([(50, 3)])
    state: Any = chat.site.state
    assert state.k_codes.dtype is torch.float16
    assert state.k_codes.shape[-1] == state.k_order.shape[-1] == 9
    assert int((entries_of(state, "k", chat.site.rule)[0, 0, :40] != 0).sum(-1).max()) == 9


def test_a_state_without_a_token_is_not_fitted() -> None:
    rule = Rule(k_as="int4", v_as="ternary", k_fit="spread", v_fit="range")
    state = State.empty(rule, torch.empty(0), B=2, H=3, C=4, D=6, V=5)
    assert state["k_order"].tolist() == [[[0, 1, 2, 3, 4, 5]] * 3] * 2
    assert state["k_unit"].unique().tolist() == state["v_unit"].unique().tolist() == [1.0]
    assert state["k_center"].unique().tolist() == state["v_center"].unique().tolist() == [0.0]
