"""All built-in policies without weight files on first calls of a few tokens, and on calls that are padding for a whole
row: row by row what each keeps alone. The ops of two layers on random tensors, no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.after_call.layers import shared_out
from kvpass.kernels.budget import kept
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.exits.merge_slots import merge_slots
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.exits.refit_slots import refit_slots
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.marks import Marks
from kvpass.kernels.rank.scored import Scoring, arrivals
from kvpass.kernels.rank.scorers.registry import find_scorer, scorers
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.bias import biased
from kvpass.kernels.slots.moves import even, evened, with_spare
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.statistics import Statistics

from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy
from kvpass.runtime.room import empty_state, with_room

HEADS, KV, DIM, LAYERS, MOST = 4, 2, 16, 2, 200
BUDGETS = {"vatp": 64, "nacl": 80, "criticalkv": 96, "critical_ada": 96, "pyramidkv": 64, "ada_pyramid": 64}


def _without_files() -> list[str]:
    policies = {name: Policy.load(name) for name in names()}
    reads = {name: find_scorer(p.score).options if p.score in scorers() else {} for name, p in policies.items()}
    evicting = {n: p for n, p in policies.items() if not p.keeps_all and p.allocate.heads != "table"}
    # those that hold codes: test_rows_alone.py
    dense = {n for n, p in evicting.items() if p.store.k == p.store.v == "dense" and p.evicted.to is None}
    return [n for n in evicting if "file" not in reads[n] and n in dense]


POLICIES = _without_files()


class Rows:
    """Queries, keys and values of a few rows, the same for a row's token wherever it stands in a batch."""

    def __init__(self, seeds: list[int]) -> None:
        made = [self._row(seed) for seed in seeds]
        self.q, self.k, self.v = (torch.stack(parts) for parts in zip(*made, strict=True))

    @staticmethod
    def _row(seed: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        sizes = ((LAYERS, HEADS, MOST, DIM), (LAYERS, KV, MOST, DIM), (LAYERS, KV, MOST, DIM))
        q, k, v = (torch.randn(*size, generator=g) for size in sizes)
        return [1.5 * q, k + 0.5 * torch.sin(torch.arange(MOST) / 9.0)[:, None], v]


class Host:
    """Two layers of a policy, fed column by column; True in a call's `valid` [B, S] is the row's next token."""

    def __init__(self, policy: str, rows: Rows) -> None:
        planned = Policy.load(policy).with_budget(BUDGETS.get(policy, 48))
        self.rules = [rule_of(planned, layer, LAYERS) for layer in range(LAYERS)]
        self.rows, self.states, self.spares = rows, [[] for _ in range(LAYERS)], [0] * LAYERS
        self.valid = torch.zeros(len(rows.q), 0, dtype=torch.bool)
        self.wo = torch.randn(24, HEADS * DIM, generator=torch.Generator().manual_seed(3))

    def call(self, valid: torch.Tensor) -> None:
        start, count = self.valid.shape[1], valid.shape[1]
        self.valid = torch.cat([self.valid, valid], 1)
        own = (self.valid.cumsum(1) - 1).clamp(min=0)[:, start:]
        causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        mask = causal & self.valid[:, None, None] & valid[:, None, :, None]
        for layer, rule in enumerate(self.rules):
            q, k, v = (self._columns(x[:, layer], own, valid) for x in (self.rows.q, self.rows.k, self.rows.v))
            step = count == 1 and start > 0
            (self._one if step else self._many)(layer, rule, (q, k, v), mask, start, own)
        if self.rules[0][ShareOut].share and not (count == 1 and start):
            for layer, (state, free) in enumerate(shared_out(list(self.states), self.rules, 2)):
                self.states[layer], self.spares[layer] = state, free

    @staticmethod
    def _columns(x: torch.Tensor, own: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[B, H, MOST, D] -> the call's columns; padding holds large numbers, which must not matter."""
        picked = x.gather(2, own[:, None, :, None].expand(-1, x.shape[1], -1, DIM))
        return torch.where(valid[:, None, :, None], picked, 9.0)

    def _one(self, layer: int, rule: Any, qkv: Any, mask: torch.Tensor, position: int, own: torch.Tensor) -> None:
        if not rule[ShareOut].share:
            self.states[layer] = with_room(self.states[layer], kept(rule, position + 1))
        elif self.spares[layer] < 1:
            self.states[layer], self.spares[layer] = with_spare(self.states[layer], 3)
        self.spares[layer] -= 1
        state, text = self.states[layer], rule.encode()
        held = bool({"scored", "weight", "mark", "place"} & set(rule[Statistics].stats))
        arrive = arrivals(*qkv[1:], state.cursor, position, text, self.wo) if held else None
        decode_attend(*qkv, mask, state.tensors(), position, DIM**-0.5, text, arrive=arrive)

    def _many(self, layer: int, rule: Any, qkv: Any, mask: torch.Tensor, position: int, own: torch.Tensor) -> None:
        (q, k, v), text, tokens = qkv, rule.encode(), position + qkv[0].shape[2]
        pos = past = bias = None
        if position == 0:
            state = empty_state(rule, tokens, k, {"B": len(k), "Hkv": KV, "D": DIM, "Dv": DIM})
        else:
            state = self.states[layer]
            state = evened(state, q.shape[2]) if rule[ShareOut].share else with_room(state, kept(rule, tokens))
            k, v, pos, past, *more = join_slots(state.tensors(), k, v, position, text)
            bias = more[0] if biased(rule) else None
        self.states[layer] = state
        told: dict[str, Any] = {"position": position, "bias": bias}
        _, stats, valid = prefill_attend(q, k, v, pos, mask, DIM**-0.5, "", text, **told)
        beside: dict[str, Any] = {}
        if {"scored", "weight", "mark", "place"} & set(rule[Statistics].stats):
            rows = None
            if {"rows", "logits"} & set(rule[Scoring].reads):
                rows = window_rows(q, k, pos, mask, valid, DIM**-0.5, "", text, **told)
            beside = {"k": k, "v": v, "rows": rows, "wo": self.wo}
        if "queries" in rule[Scoring].reads:
            angle = own[..., None] * 0.7 ** torch.arange(1, DIM // 2 + 1)
            angle = torch.cat([angle, angle], -1)
            beside |= {"queries": q, "turns": torch.stack([angle.cos(), angle.sin()])}
        if rule[Marks].marked:
            beside["marks"] = torch.zeros(valid.shape, dtype=torch.int32)
        shown = mask if pos is not None else None
        score, stats, cursor = score_slots(stats, past, pos, valid, state.cursor, position, text, mask=shown, **beside)
        room = score.shape[2] if rule[Ragged].ragged else state.slots
        idx = select_slots(score, cursor, room)
        own = [bias] if biased(rule) else []
        compact_slots((k, v, pos, stats, *own), idx, cursor, state.tensors(), text)
        merge_slots(k, v, score, stats, idx, state.tensors(), text)
        if rule[Refit].refit_queries:
            refit_slots(q, k, v, pos, mask, valid, DIM**-0.5, "", score, idx, state.tensors(), text, **told)

    def kept(self, row: int) -> list[list[list[int]]]:
        """Which of its own tokens a row keeps, by layer and head."""
        own = (self.valid[row].cumsum(0) - 1).tolist()
        held = [even(state).pos[row].tolist() for state in self.states]
        return [[sorted(own[p] for p in head if p >= 0) for head in layer] for layer in held]


@pytest.mark.parametrize("policy", POLICIES)
def test_calls_that_are_padding_for_a_whole_row(policy: str) -> None:
    """A prompt in chunks of 40 that begins with 50 columns of padding in one row, 2 steps and a last chunk."""
    left = torch.stack([torch.arange(120) >= 120 - n for n in (120, 70)])
    calls = [*left.split(40, 1), *torch.ones(2, 2, dtype=torch.bool).split(1, 1), torch.ones(2, 20, dtype=torch.bool)]
    batch = Host(policy, Rows([0, 1]))
    for valid in calls:
        batch.call(valid)
    for row in range(2):
        alone = Host(policy, Rows([row]))
        for valid in calls:
            count = int(valid[row].sum())
            if count:
                alone.call(torch.ones(1, count, dtype=torch.bool))
        assert batch.kept(row) == alone.kept(0), row


@pytest.mark.parametrize("first", [1, 2, 9])
@pytest.mark.parametrize("policy", POLICIES)
def test_first_calls_of_a_few_tokens(policy: str, first: int) -> None:
    """Then 2 steps and a turn of 70: nothing fails, nothing goes before the budget is full, and nothing exceeds it; in
    a batch with a longer row the same is kept.
    """
    calls = [first, 1, 1, 70]
    alone, batch = Host(policy, Rows([5])), Host(policy, Rows([5, 6]))
    for at, count in enumerate(calls):
        alone.call(torch.ones(1, count, dtype=torch.bool))
        wide = torch.ones(2, count + (30 if at == 0 else 0), dtype=torch.bool)
        wide[0, : wide.shape[1] - count] = False
        batch.call(wide)
        held = alone.kept(0)
        if at < 3 and policy not in UNBOUNDED:
            assert all(head == list(range(first + at)) for layer in held for head in layer)
    assert batch.kept(0) == alone.kept(0)
    limit = sum(kept(rule, sum(calls)) for rule in alone.rules)
    assert sum(len(head) for layer in held for head in layer) <= KV * limit


UNBOUNDED = {"corm", "fastgen", "simlayerkv"}
"""Policies with a threshold, which may keep less than there is room for."""
