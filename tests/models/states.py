"""Rules of all built-in policies, and random states under any rule, ragged ones too: what tests of a step share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from bench.own_weights import with_files
from kvpass.kernels.budget import budget
from kvpass.kernels.codecs.entries import fit
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded, fit_fields
from kvpass.kernels.rank.marks import KEEP, MARK
from kvpass.kernels.rank.places import NUMBER, PLACE, Protected
from kvpass.kernels.rank.ranking import recent_of
from kvpass.kernels.rank.rings import RING
from kvpass.kernels.rank.scored import later
from kvpass.kernels.rank.weights import WEIGHT
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import EXTRA, SHIFT
from kvpass.kernels.slots.ragged import Ragged, starts
from kvpass.kernels.slots.state import State, flat
from kvpass.kernels.slots.statistics import Statistics, keeps, stat
from kvpass.kernels.testing import assert_close, bits, empty_state
from torch import Tensor

from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

LAYERS, BUDGET = 3, 0.3


@cache
def weights(layers: int = LAYERS, hidden: int = 32) -> Path:
    """Files of weights of two KV heads of 16, one for each kind that some policy reads."""
    folder, g = Path(mkdtemp()), torch.Generator().manual_seed(0)
    shapes = {
        "q_filters": {"filters": (2, 16)},
        "kvp": {"w1": (2, 8, 33), "b1": (2, 8), "w2": (2, 8), "b2": (2,)},
        "gate": {"w1": (8, hidden), "b1": (8,), "w2": (2, 8), "c": (2,)},
        "surrogate": {"weight": (2, hidden), "bias": (2,)},
        "heads": {"heads": (2,)},
    }
    for name, tensors in shapes.items():
        made = {key: torch.rand(layers, *shape, generator=g) for key, shape in tensors.items()}
        torch.save(made, folder / f"{name}.pt")
    return folder


def policy(name: str) -> Policy:
    """A built-in policy, with a file where it needs one."""
    keeps_all = Policy.load(name).keeps_all
    return Policy.load(with_files(name, weights())).with_budget(None if keeps_all else BUDGET)


@cache
def builtin() -> dict[str, Rule]:
    """Each rule of the built-in policies, for a model of `LAYERS` layers."""
    found: dict[str, Rule] = {}
    for name in names():
        for layer in range(LAYERS):
            rule = rule_of(policy(name), layer, LAYERS)
            if rule not in found.values():
                found[f"{name}, layer {layer}" if layer else name] = rule
    return found


def state_under(
    rule: Rule, seen: int, dim: int = 16, batch: int = 2, heads: int = 2, seed: int = 0, wide: int | None = None
) -> State:
    """A state after `seen` tokens, its heads around their budgets, protected tokens held; contents of empty slots are
    NaN.
    """
    g = torch.Generator().manual_seed(seed)
    ragged, full = rule[Ragged].ragged, budget(rule, seen)
    size = min(int(full), seen - 4) if rule.evicts else seen
    live = torch.full((batch, heads), size)
    if ragged:
        live = live + torch.tensor([[5, -4], [-7, 6]])[:batch, :heads]
    elif rule.drops and "all" not in rule.encode():
        live = live - torch.tensor([[0, 3], [0, 1]])[:batch, :heads]
    live = live.clamp(min(size, rule[Protected].sinks + int(recent_of(rule, size)) + 1), seen)
    if rule.demotes:  # all tokens, but for a few that the caller dropped in the second row
        live = seen - torch.tensor([[0, 0], [3, 3]])[:batch, :heads]
    slots = -(-int((live + 6).sum()) // live.numel()) if ragged else int(live.max()) + 6
    state = empty_state(batch, heads, slots, dim, rule, value_dim=wide)
    state.cursor[..., 0], state.cursor[..., 2], state.cursor[..., 3] = live, seen, 0
    if ragged:
        room = live + 6
        begin = room.flatten().cumsum(0) - room.flatten() - torch.arange(live.numel()) * slots
        state.cursor[..., EXTRA] = live - size + torch.tensor([[0, -1], [1, 0]])[:batch, :heads]
        state.cursor[..., SHIFT] = begin.view(live.shape)
    first = starts(state.cursor, slots)
    for b in range(batch):
        alike = torch.randint(int(live[b, 0]) + 1, (), generator=g)
        middle = torch.randperm(seen, generator=g)
        for h in range(heads):
            n = int(live[b, h])
            order = _protected_first(middle, n, rule)
            free = min(int(alike), n)
            if rule.demotes:
                order, free = middle[:n].sort().values, n
            at = int(first[b, h]) + torch.tensor([s for s in range(n + 1) if s != free])
            state.cursor[b, h, 1] = free
            for field, tensor in state.per_slot():
                target, where = flat(field, tensor), (slice(None),) * field.rows + (at,)
                if field.name == "pos":
                    target[where] = order[:n].int()
                elif field.name == "stats":
                    target[where] = _statistics(rule, order[:n], seen, g)
                elif target.numel() and not field.codes:
                    target[where] = torch.randn(target[where].shape, generator=g)
    _encode(state, rule, seen, g)
    return state


def _encode(state: State, rule: Rule, seen: int, g: torch.Generator) -> None:
    """Codes of random entries, NaN where nothing is; copies of the first tokens and of the newest, as
    `kvpass.kernels.codecs.whole` lays them out.
    """
    storage = rule[Storage]
    fill_fits(state, rule, g)
    for half in coded(rule):
        state[half].copy_(torch.randn(state[half].shape, generator=g))
        width = storage.held_width(half, state[half].shape[3])
        entries = torch.randn(*state.pos.shape, width, generator=g)
        entries = entries.masked_fill(state.pos[..., None] < 0, float("nan"))
        codec = fit(state, half, state[half].shape[3], rule).codec(storage.codec_of(half))
        parts = codec.encode(entries, storage.scale_group)
        for name, part in zip(storage.code_fields(half), parts, strict=True):
            state[name].copy_(part)
    if rule.demotes:
        _hold_whole(state, rule, seen, g)
        return
    for position in range(seen if coded(rule) else 0):
        if position < storage.whole_sinks:
            state[WHOLE_AT][..., position] = position
        if storage.residual:
            state[WHOLE_AT][..., storage.whole_sinks + position % storage.residual] = position


def fill_fits(state: State, rule: Rule, g: torch.Generator) -> None:
    """Fits as some prompt may have made them."""
    for name in fit_fields(rule):
        noise = torch.rand(state[name].shape, generator=g)
        if name.endswith("order"):
            wide = torch.rand(*noise.shape[:2], state[name[0]].shape[3], generator=g)
            noise = wide.argsort(-1)[..., : noise.shape[2]].sort(-1).values
        if name.endswith("atoms"):
            noise = torch.nn.functional.normalize(noise - 0.5, dim=-1)
        state[name].copy_(0.5 + noise if name.endswith("unit") else noise)


def _hold_whole(state: State, rule: Rule, seen: int, g: torch.Generator) -> None:
    """Copies of as many tokens as the budget says, protected ones first, in any places; all others hold zeros."""
    whole = int(budget(rule, seen))
    for one, pos in zip(state[WHOLE_AT].flatten(0, 1), state.pos.flatten(0, 1), strict=True):
        held = pos[pos >= 0]
        recent = int(recent_of(rule, whole)) + 4
        middle = held[rule[Protected].sinks : -recent]
        middle = middle[torch.randperm(len(middle), generator=g)]
        order = torch.cat([held[: rule[Protected].sinks], held[-recent:], middle])[:whole]
        one[torch.randperm(whole + 1, generator=g)[: len(order)]] = order
    for half in coded(rule):
        state[half].masked_fill_((state[WHOLE_AT] < 0)[..., None], 0.0)


def _protected_first(middle: Tensor, held: int, rule: Rule) -> Tensor:
    """Positions in an order in which the first and the last tokens come first."""
    sinks, recent = rule[Protected].sinks, int(recent_of(rule, held + 8)) + 4
    newest = torch.arange(len(middle) - 1, max(len(middle) - recent, sinks) - 1, -1)
    safe = torch.cat([torch.arange(sinks), newest])
    order = torch.cat([safe, middle[~torch.isin(middle, safe)]])[:held]
    return order[torch.argsort(middle[:held])]


def _statistics(rule: Rule, pos: Tensor, seen: int, g: torch.Generator) -> Tensor:
    """float32 [N, n] as slots at such positions may have."""
    n = len(pos)
    values = {name: torch.rand(n, generator=g) for name in rule[Statistics].stats}
    for name, x in values.items():
        if name == "count":
            values[name] = 1 + (5 * x).floor()
        elif name == "important":
            values[name] = (3 * x).floor()
        elif name == "last":
            values[name] = (x * seen).floor()
        elif name in (NUMBER, PLACE):
            values[name] = pos.float()
        elif name == MARK:
            values[name] = torch.where(x > 0.9, float(KEEP), 0.0)
        elif name == RING:
            values[name] = torch.where(pos < 4, -1.0, (4 * x).floor())
        elif name == "scored":
            values[name] = torch.where(x > 0.7, later(pos.int()), 2 * x - 1)
        elif name == WEIGHT:
            values[name] = 1 + x
    return torch.stack(list(values.values())) if values else torch.empty(0, n)


def arriving(rule: Rule, number: int, batch: int = 2, heads: int = 2) -> Tensor | None:
    """What a token brings, if the rule's slots keep such statistics."""
    if not rule[Statistics].arrives:
        return None
    g = torch.Generator().manual_seed(number)
    out = torch.zeros(len(rule[Statistics].stats), batch, heads)
    for name in (NUMBER, PLACE):
        if keeps(rule, name):
            out[stat(rule, name)] = number
    if keeps(rule, "scored"):
        out[stat(rule, "scored")] = (
            later(torch.tensor(number).int()) if number % 2 else torch.randn(batch, heads, generator=g)
        )
    if keeps(rule, WEIGHT):
        out[stat(rule, WEIGHT)] = 1 + torch.rand(batch, heads, generator=g)
    return out


def held(state: State) -> Tensor:
    """Which places are in use, bool [B, Hkv, C]."""
    return state.pos >= 0


def same(got: State, want: State, before: State, step: int, merged: tuple[str, ...] = ()) -> None:
    """Kept positions and cursors equal, statistics within rounding, nothing else was written but into merged fields."""
    assert torch.equal(got.pos, want.pos), f"pos at step {step}"
    assert torch.equal(got.cursor, want.cursor), f"cursor at step {step}"
    used = held(want)
    assert_close(got.stats[:, used], want.stats[:, used], torch.float32, stats=True, what=f"stats at step {step}")
    for field in want.fields:
        x, y, z = (s[field.name] for s in (got, want, before))
        if not field.per_slot:
            assert torch.equal(bits(x), bits(y)), f"{field.name} at step {step}"
        elif field.rows == 0 and field.name != "pos":
            assert torch.equal(bits(x[used]), bits(y[used])), f"{field.name} at step {step}"
            old = used & (want.pos == before.pos) & (field.name not in merged)
            assert torch.equal(bits(x[old]), bits(z[old])), f"{field.name}: a used slot was written at step {step}"
