"""The library's ops of one attention layer and the oracle on the same random queries, keys and values: no model and no
compiler, so that many policies and shapes can be compared."""

from __future__ import annotations

from typing import Any

import torch
from kvpass.kernels.after_call.layers import shared_out
from kvpass.kernels.after_call.reindex import Reindex, reindex
from kvpass.kernels.budget import kept, within
from kvpass.kernels.choose_whole import choose_whole
from kvpass.kernels.codecs.ops import encode_fitted, encode_slots, fit_slots, keep_whole
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded, fit_fields
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.exits.merge_slots import merge_slots
from kvpass.kernels.exits.refit import Refit
from kvpass.kernels.exits.refit_slots import refit_slots
from kvpass.kernels.join_slots import join_slots
from kvpass.kernels.prefill_attend import prefill_attend
from kvpass.kernels.rank.scored import Scoring, arrivals
from kvpass.kernels.rank.scores import score_slots
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.rank.window_rows import window_rows
from kvpass.kernels.rule import Rule
from kvpass.kernels.select_slots import select_slots
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.moves import even, evened, with_spare
from kvpass.kernels.slots.ragged import Ragged
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from oracle.base import Policy
from oracle.simulator import Simulator

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy as RealPolicy
from kvpass.runtime.room import empty_state, with_room, with_room_beside

DIM = 16


class Site:
    """One layer of the library: the order of ops of docs/design/0001. `dims`: entries of a key and of a value."""

    def __init__(self, rule: Rule, projection: torch.Tensor, dims: tuple[int, int] = (DIM, DIM)) -> None:
        self.rule, self.projection, self.spare, self.dims = rule, projection, 0, dims
        self.state: State | None = None

    @property
    def arrives(self) -> bool:
        return bool({"scored", "weight", "mark", "place", "number"} & set(self.rule[Statistics].stats))

    def one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, position: int) -> torch.Tensor:
        if not self.rule[ShareOut].share:
            self.grow(position + 1)
        elif self.spare < 1:
            self.state, self.spare = with_spare(self.state, 3)
        self.spare -= 1
        rule, cursor = self.rule.encode(), self.state.cursor
        arrive = arrivals(k, v, cursor, position, rule, self.projection) if self.arrives else None
        scale = self.dims[0] ** -0.5
        return decode_attend(q, k, v, mask, self.state.tensors(), position, scale, rule, arrive=arrive)

    def many(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, position: int
    ) -> torch.Tensor:
        rule, tokens, scale = self.rule.encode(), position + q.shape[2], self.dims[0] ** -0.5
        codes = coded(self.rule)
        first, own = not self.state, (k, v)
        if first:
            sizes = {"B": k.shape[0], "Hkv": k.shape[1], "D": self.dims[0], "Dv": self.dims[1]}
            self.state = empty_state(self.rule, tokens, k, sizes)
            self.poison()
        elif self.rule[ShareOut].share:
            self.state = evened(self.state, q.shape[2])
        else:
            self.grow(tokens)
        names = [field.name for field, _ in self.state.per_slot()]
        all_names = list(dict.fromkeys(["k", "v", *names]))
        keys: dict[str, Any] = {**dict.fromkeys(all_names), "k": k, "v": v}
        if not first:
            keys = dict(zip(all_names, join_slots(self.state.tensors(), k, v, position, rule), strict=True))
        held, fits = self.code_names(), [self.state[name] for name in fit_fields(self.rule)]
        if first and held and not fits:
            keys |= dict(zip(held, encode_slots(k, v, rule), strict=True))
        k, v, pos, past = (keys[name] for name in ("k", "v", "pos", "stats"))
        told: dict[str, Any] = {"position": position, "bias": keys.get(BIAS)}
        out, stats, valid = prefill_attend(q, k, v, pos, mask, scale, "", rule, **told)
        if fits:
            old = [] if first else [keys[name] for name in held]
            fit_slots(q, *own, valid, self.state.cursor, fits, rule)
            keys |= dict(zip(held, encode_fitted(*own, fits, old, rule), strict=True))
        beside: dict[str, Any] = {}
        if self.arrives:
            reads = {"rows", "logits"} & set(self.rule[Scoring].reads)
            rows = window_rows(q, k, pos, mask, valid, scale, "", rule, **told) if reads else None
            beside = {"k": k, "v": v, "rows": rows, "wo": self.projection}
        if self.rule.demotes and not first:
            beside["whole"] = self.state[WHOLE_AT]
        shown = mask if pos is not None else None
        before = self.state.cursor, position, rule
        score, keys["stats"], cursor = score_slots(stats, past, pos, valid, *before, mask=shown, **beside)
        room = score.shape[2] if self.rule[Ragged].ragged else self.state.slots
        chosen = select_slots(score, cursor, room)
        compact_slots([keys[name] for name in names], chosen, cursor, self.state.tensors(), rule)
        merge_slots(k, v, score, keys["stats"], chosen, self.state.tensors(), rule)
        if self.rule[Refit].refit_queries:
            seen = q, k, v, pos, mask, valid, scale, ""
            refit_slots(*seen, score, chosen, self.state.tensors(), rule, **told)
        if self.rule.demotes:
            choose_whole(k, v, pos, score, self.state.tensors(), rule)
        elif codes:
            keep_whole(*own, valid, position, self.state.tensors(), rule)
        return out

    def code_names(self) -> list[str]:
        return [name for half in coded(self.rule) for name in self.rule[Storage].code_fields(half)]

    def poison(self) -> None:
        """What is undefined is NaN, or the largest code."""
        for field, tensor in self.state.per_slot():
            if field.fill is None:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    def grow(self, tokens: int) -> None:
        """Room for so many tokens."""
        self.state = with_room(self.state, kept(self.rule, tokens))
        if self.rule.demotes:
            self.state = with_room_beside(self.state, within(self.rule, tokens))

    def positions(self) -> torch.Tensor:
        """What the budget keeps, in slots or whole."""
        return self.state[WHOLE_AT] if self.rule.demotes else even(self.state).pos


def after_call(sites: list[Site], shares: bool, angles: Any) -> None:
    """What is done between calls, outside their graphs."""
    if sites[0].rule[ShareOut].share and shares:
        states = shared_out([site.state for site in sites], [site.rule for site in sites], 2)
        for site, (state, free) in zip(sites, states, strict=True):
            site.state, site.spare = state, free
    for site in sites:
        if site.rule[Reindex].reindex:
            reindex(site.state, site.rule, angles)


class Layers:
    """A few layers in the library and in the oracle, fed the same random tensors."""

    def __init__(
        self, policy: Any, budget: int | float, shape: tuple[int, int], layers: int = 2, meaning: Policy | None = None
    ) -> None:
        self.generator = torch.Generator().manual_seed(11)
        self.shape, self.tokens = shape, 0
        self.simulator = Simulator(policy if meaning is None else meaning, budget)
        self.simulator.depth = layers
        self.simulator.angles = 0.7 ** torch.arange(1, DIM // 2 + 1, dtype=torch.float64)
        planned, self.sites = RealPolicy.load(policy).with_budget(budget), []
        for index in range(layers):
            projection = self.random(24, shape[0] * DIM)
            self.simulator.outward[index] = projection.double().T.unflatten(0, (-1, DIM))
            self.sites.append(Site(rule_of(planned, index, layers), projection))
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.padding: torch.Tensor | None = None

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def call(self, mask: torch.Tensor) -> None:
        """mask: bool [B, S], True = a token, False = padding."""
        (batch, count), (heads, kv_heads) = mask.shape, self.shape
        self.padding = mask if self.padding is None else torch.cat([self.padding, mask], 1)
        total = self.tokens + count
        causal = torch.ones(count, total, dtype=torch.bool).tril(self.tokens)
        sees = causal & self.padding[:, None, None] & mask[:, None, :, None]
        for index, site in enumerate(self.sites):
            q = 1.5 * self.random(batch, heads, count, DIM)
            k, v = self.random(batch, kv_heads, count, DIM), self.random(batch, kv_heads, count, DIM)
            k = k + 0.5 * torch.sin(torch.arange(total - count, total) / 9.0)[:, None]  # neighbours are alike
            k = k * (1 + torch.arange(DIM) / DIM)
            old = self.past[index] if len(self.past) > index else (k[:, :, :0], v[:, :, :0])
            joined = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
            self.past[index : index + 1] = [joined]
            (site.one if count == 1 and self.tokens else site.many)(q, k, v, sees, self.tokens)
            self.simulator.attend(index, q, *joined, sees, DIM**-0.5)
        after_call(self.sites, count > 1 or not self.tokens, self.simulator.angles)
        self.tokens = total
        self.simulator.follow([site.positions() for site in self.sites])

    def converse(self, turns: list[tuple[int, int]], lengths: list[int]) -> None:
        """Turns of so many tokens at once, then so many one by one; rows of the first one are padded to `lengths`."""
        for turn, (together, alone) in enumerate(turns):
            kept = lengths if turn == 0 else [together] * len(lengths)
            self.call(torch.stack([torch.arange(together) >= together - n for n in kept]))
            for _ in range(alone):
                self.call(torch.ones(len(lengths), 1, dtype=torch.bool))
