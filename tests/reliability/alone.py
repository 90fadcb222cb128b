"""A row's calls again, one by one, on an empty cache, by itself and without a mask; and what each head holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.slots.moves import even
from kvpass.kernels.slots.state import State
from oracle.drive import compare_logits, kept_positions
from oracle.hf import Oracle
from oracle.policies import POLICIES
from reliability.plain import Row
from reliability.policies import BUDGET, WINDOW, compiled, model_of
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache

from kvpass.api.holdings import stores
from kvpass.api.live_slots import LayerView, layer_view

JUDGED = ("full", "h2o", "streaming_llm", "tova", "roco", "snapkv")
"""Policies whose replays an oracle follows: the unmodified model, with masks in the place of evictions."""


@dataclass(frozen=True)
class Held:
    """What one KV head of one layer holds of a row, by token.

    Attributes:
        numbers: which of the row's tokens, ascending.
        scores: float32 [n].
        stats: float32 [N, n].
        entries: keys and values [n, D + Dv], decoded.
    """

    numbers: list[int]
    scores: Tensor
    stats: Tensor
    entries: Tensor


@dataclass(frozen=True)
class Life:
    """A row's calls on a cache of its own.

    Attributes:
        heard: logits [vocabulary] of each call's last token.
        held: of each layer's heads, at the end.
    """

    heard: list[Tensor]
    held: list[list[Held]]


def held_of(cache: Any, rows: Sequence[Row]) -> list[list[list[Held]]]:
    """What a cache holds of each row: [row][layer][head].

    Raises AssertionError if a head holds what is no token of the row, or something twice.
    """
    parts = [(layer_view(store), even(store.state)) for store in stores(cache)]
    found = []
    for b, row in enumerate(rows):
        number = {column: at for at, column in enumerate(row.columns)}
        found.append([[_head(*part, b, h, number) for h in range(part[1].pos.shape[1])] for part in parts])
    return found


def _head(view: LayerView, state: State, b: int, h: int, number: dict[int, int]) -> Held:
    columns = [column for column in view.positions[b, h].tolist() if column >= 0]
    assert len(set(columns)) == len(columns), f"head {h} of row {b} holds a token twice: {columns}"
    assert set(columns) <= set(number), f"head {h} of row {b} holds what is no token of it: {columns}"
    n = len(columns)
    slots = state.pos[b, h]
    order = torch.where(slots >= 0, slots, torch.iinfo(torch.int32).max).argsort()[:n]
    assert slots[order].tolist() == columns, "the slots are not what inspect says"
    entries = torch.cat([view.keys[b, h, :n], view.values[b, h, :n]], -1).float()
    return Held([number[c] for c in columns], view.scores[b, h, :n], state.stats[:, b, h][:, order], entries)


def life(name: str, row: Row, judged: bool) -> Life:
    """Under a policy of `policies.NAMES`; judged by the oracle too, if it knows the policy."""
    run, heard = compiled(name), []
    cache = DynamicCache(config=run.config)
    oracle = _oracle(name) if judged and name in JUDGED else None
    for call in row.calls:
        ids = torch.tensor([call])
        with torch.no_grad():
            logits = run(ids, **with_cache(run, cache), use_cache=True).logits[0, -1]
        heard.append(logits)
        if oracle is not None:
            want = oracle(ids)
            oracle.simulator.follow(kept_positions(cache))
            compare_logits(logits[None], want)
    alone = Row(row.calls, tuple(range(sum(map(len, row.calls)))))
    return Life(heard, held_of(cache, [alone])[0])


def _oracle(name: str) -> Oracle:
    policy = POLICIES[name]()
    for shortened in ("window", "recent"):
        if hasattr(policy, shortened):
            setattr(policy, shortened, WINDOW)
    return Oracle(model_of(name), policy, 1.0 if name == "full" else BUDGET, floor=8)


def difference(got: list[list[Held]], want: list[list[Held]], coded: bool) -> str:
    """Why a row in company is not what it is alone; "" if it is, "a near tie" if rounding may have chosen."""
    tie = False
    for layer, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for h, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one.numbers != other.numbers:
                if not _tied(one, other):
                    return f"layer {layer}, head {h} holds {one.numbers}, and alone {other.numbers}"
                tie = True
    if tie:
        return "a near tie"
    for layer, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for h, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.allclose(one.stats, other.stats, rtol=2e-3, atol=1e-4, equal_nan=True):
                return f"layer {layer}, head {h} has statistics {one.stats}, and alone {other.stats}"
            if not _same_entries(one.entries, other.entries, coded):
                return f"layer {layer}, head {h} has other keys or values than alone"
    return ""


def _tied(one: Held, other: Held) -> bool:
    """Whether heads hold as many slots, and those that only one of them holds score alike."""
    mine = [at for at, n in enumerate(one.numbers) if n not in other.numbers]
    its = [at for at, n in enumerate(other.numbers) if n not in one.numbers]
    if len(mine) != len(its):
        return False
    return torch.allclose(one.scores[mine].sort().values, other.scores[its].sort().values, rtol=1e-3, atol=1e-5)


def _same_entries(one: Tensor, other: Tensor, coded: bool) -> bool:
    """Of codes few may be on the other side of the middle between two, for rounding."""
    far = (one - other).abs() > 2e-3 * other.abs().clamp(min=0.1)
    return float(far.float().mean()) < (0.02 if coded else 1e-9) if far.numel() else True


def same_words(got: Tensor, want: Tensor, coded: bool) -> bool:
    """Logits [vocabulary] but for rounding."""
    return bool((got - want).abs().max() <= (0.05 if coded else 2.0**-9) * want.abs().max())
