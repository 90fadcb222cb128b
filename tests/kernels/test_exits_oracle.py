"""What slots hold when others were merged into them, after every call, against `oracle.exits`: a padded batch, grouped
heads, a prompt, steps, a second turn with padding of its own, and steps again.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.after_call.deferred import evicted
from kvpass.kernels.after_call.layers import shared_out
from kvpass.kernels.exits.record import BAR, MERGED
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.slots.bias import BIAS, biased
from kvpass.kernels.slots.moves import even
from oracle.exits import EXITS, Facts, Head, Token
from oracle.ops import DIM, Site

from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy
from kvpass.runtime.room import with_room

HEADS, KV, LAYERS = 4, 2, 2
GROUP = HEADS // KV
TURNS = [([30, 22], "left", 9), ([9, 6], "right", 4), ([2, 12], "left", 6)]
"""Tokens of each row, where padding is not, and steps after them."""


class Talk:
    """Layers of ops under a policy, and what an oracle thinks they hold."""

    def __init__(self, spec: dict[str, Any], budget: int, exit: str, options: dict[str, Any], rows: int = 2) -> None:
        planned = Policy.load(spec).with_budget(budget)
        rules = [rule_of(planned, at, LAYERS) for at in range(LAYERS)]
        self.sites = [Site(rule, torch.randn(24, HEADS * DIM)) for rule in rules]
        self.base = [
            Site(rule.replace(merge_into=""), site.projection) for rule, site in zip(rules, self.sites, strict=True)
        ]
        self.every, self.exit = planned.every, exit
        self.facts = {"budget": budget, "options": options}
        self.heads = [[[Head(h, at) for h in range(KV)] for _ in range(rows)] for at in range(LAYERS)]
        self.rows: list[list[dict[str, Any]]] = [[{} for _ in range(rows)] for _ in range(LAYERS)]
        self.shown = torch.zeros(rows, 0, dtype=torch.bool)
        self.generator, self.waited, self.merged, self.same_kept = torch.Generator().manual_seed(3), 0, 0, True

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def converse(self) -> None:
        for lengths, side, steps in TURNS:
            width = max(lengths)
            place = torch.arange(width)
            own = [place >= width - n if side == "left" else place < n for n in lengths]
            self.call(torch.stack(own))
            for _ in range(steps):
                self.call(torch.ones(len(lengths), 1, dtype=torch.bool))

    def call(self, own: torch.Tensor) -> None:
        start, (rows, count) = self.shown.shape[1], own.shape
        step = count == 1 and start > 0
        self.shown = torch.cat([self.shown, own], 1)
        causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        mask = causal & self.shown[:, None, None] & own[:, None, :, None]
        for at, site in enumerate(self.sites):
            q, k, v = (self.random(rows, heads, count, DIM) for heads in (HEADS, KV, KV))
            k = k + 3 * torch.sin(torch.arange(start, start + count) / 5.0)[:, None]  # neighbours are alike
            for one in (site, self.base[at]):
                if step and self.every > 1:
                    one.state = with_room(one.state, self.facts["budget"] + self.every)
                (one.one if step else one.many)(q, k, v, mask, start)
            for b in range(rows):
                self.tell(self.heads[at][b], b, own[b], q[b].tolist(), k[b].tolist(), v[b].tolist())
        self.after(step)
        for at, site in enumerate(self.sites):
            for b in range(rows):
                self.check(site, at, b, step)
        self.same_kept &= all(
            torch.equal(a.positions(), b.positions()) for a, b in zip(self.sites, self.base, strict=True)
        )

    def tell(self, heads: list[Head], b: int, own: torch.Tensor, q: Any, k: Any, v: Any) -> None:
        """The oracle sees a row's call."""
        columns, end = own.nonzero().flatten().tolist(), int(self.shown[b].sum())
        numbers = [end - len(columns) + i for i in range(len(columns))]
        for head in heads:
            for n, c in zip(numbers, columns, strict=True):
                head.tokens[n] = Token(k[head.index][c], v[head.index][c])
            group = range(head.index * GROUP, (head.index + 1) * GROUP)
            head.attend([[q[g][c] for c in columns] for g in group], numbers, DIM**-0.5)

    def after(self, step: bool) -> None:
        """What the runtime does when a call is over."""
        self.waited = self.waited + 1 if step else 0
        for sites in (self.sites, self.base):
            if sites[0].rule[ShareOut].share and not step:
                states = shared_out([site.state for site in sites], [site.rule for site in sites], 2)
                for site, (state, free) in zip(sites, states, strict=True):
                    site.state, site.spare = state, free
            if self.every > 1 and self.waited == self.every:
                for site in sites:
                    site.state = evicted(site.state, site.rule)
        self.waited %= self.every

    def check(self, site: Site, at: int, b: int, step: bool) -> None:
        """Merge in the oracle what the library no longer holds, and compare."""
        state, heads, row = even(site.state), self.heads[at][b], self.rows[at][b]
        number = self.shown[b].cumsum(0) - 1
        held = [{int(number[p]): s for s, p in enumerate(pos.tolist()) if p >= 0} for pos in state.pos[b]]
        kept = [sorted(slots) for slots in held]
        gone = [sorted(set(head.tokens) - set(stay)) for head, stay in zip(heads, kept, strict=True)]
        assert all(set(stay) <= set(head.tokens) for head, stay in zip(heads, kept, strict=True))
        before = [{n: (t.key, t.value) for n, t in head.tokens.items()} for head in heads]
        EXITS[self.exit](heads, gone, kept, Facts(step, int(self.shown[b].sum()), **self.facts), row)
        for head, slots, leaving, old in zip(heads, held, gone, before, strict=True):
            for n in leaving:
                del head.tokens[n]
            for n, slot in slots.items():
                token, where = head.tokens[n], (b, head.index, slot)
                self.merged += (token.key, token.value) != old[n]
                for half, want in (("k", token.key), ("v", token.value)):
                    got, wanted = state[half][where].double(), torch.tensor(want, dtype=torch.float64)
                    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5), (half, at, b, head.index, n)
            if self.exit == "razor_attention":
                assert state[MERGED][b, head.index] == head.merged
            if biased(site.rule):
                wanted = {slot: math.log(1 + head.merged) if n == 4 else 0.0 for n, slot in slots.items()}
                assert all(abs(float(state[BIAS][b, head.index, s]) - x) < 1e-5 for s, x in wanted.items())
            if self.exit == "d2o" and "bar" in row:
                assert abs(float(state[BAR][b, head.index]) - row["bar"]) < 1e-5


SMALL = {"observe": {"queries": 6}, "protect": {"recent": 6}}
NEXT = {"into": "next", "count": 4, "weight": "even", "mean": "none", "gate": "chance", "at": "steps"}
ONE = {"into": "one_slot", "halves": "both", "weight": "even"}
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "merging": ("merging", {"extends": "merging", **SMALL}, 14, {}),
    "a threshold": (
        "merging",
        {"extends": "merging", **SMALL, "evicted": {"merge": {"threshold": 0.9}}},
        14,
        {"threshold": 0.9},
    ),
    "of positions": ("merging", {"extends": "streaming_llm", "evicted": "merge"}, 12, {}),
    "later": ("merging", {"extends": "h2o", "evicted": "merge", "every": 3}, 12, {}),
    "uneven heads": ("merging", {"extends": "ada_snapkv", **SMALL, "evicted": "merge"}, 14, {}),
    "uneven layers": ("merging", {"extends": "layer_defensivekv", **SMALL, "evicted": "merge"}, 14, {}),
    "cam": ("cam", {"extends": "cam"}, 24, {"count": 16}),
    "cam, few": ("cam", {"extends": "cam", "seed": 5, "evicted": {"merge": {"count": 3}}}, 11, {"count": 3, "seed": 5}),
    "cam on h2o": ("cam", {"extends": "h2o", "evicted": {"merge": NEXT}}, 12, {"count": 4}),
    "cam, later": ("cam", {"extends": "cam", "every": 3, "evicted": {"merge": {"count": 3}}}, 11, {"count": 3}),
    "d2o": ("d2o", {"extends": "d2o"}, 14, {}),
    "d2o, later": ("d2o", {"extends": "d2o", "every": 4}, 14, {}),
    "kvmerger": ("kvmerger", {"extends": "kvmerger"}, 14, {"threshold": 0.75, "sigma": 5.0}),
    "kvmerger, near": (
        "kvmerger",
        {"extends": "kvmerger", "evicted": {"merge": {"sigma": 0.9, "threshold": 0.6}}},
        14,
        {"threshold": 0.6, "sigma": 0.9},
    ),
    "elastic_cache": ("elastic_cache", {"extends": "elastic_cache", "protect": {"recent": 5}}, 14, {}),
    "one slot": ("razor_attention", {"extends": "streaming_llm", "evicted": {"merge": ONE}}, 12, {}),
    "one slot that counts": (
        "razor_attention",
        {"extends": "streaming_llm", "evicted": {"merge": {**ONE, "bias": "count"}}},
        12,
        {},
    ),
    "one slot that counts, later": (
        "razor_attention",
        {"extends": "streaming_llm", "every": 3, "evicted": {"merge": {**ONE, "bias": "count"}}},
        12,
        {},
    ),
    "razor_attention": ("razor_attention", {"extends": "razor_attention", "protect": {"recent": 3}}, 14, {}),
}
VALUES = {"merging", "cam"}


def talk(name: str, folder: Any) -> Talk:
    exit, spec, budget, options = CASES[name]
    spec = {"name": "mine", **spec}
    if exit == "razor_attention" and "razor" in spec["extends"]:
        torch.save({"heads": torch.tensor([[1.0, 0.0], [0.2, 0.8]])}, folder / "heads.pt")
        spec["allocate"] = {"file": str(folder / "heads.pt")}
    return Talk(spec, budget, exit, options)


@pytest.mark.parametrize("name", list(CASES))
def test_slots_hold_what_the_oracle_says(name: str, tmp_path: Any) -> None:
    told = talk(name, tmp_path)
    told.converse()
    assert told.merged > 10, "nothing was merged: the comparison says nothing"
    if told.exit in VALUES or name.startswith("one slot"):
        assert told.same_kept, "values alone change no choice"
    rows = [row for layer in told.rows for row in layer]
    for what in ("draws", "passed"):
        if any(what in row for row in rows):
            assert {one for row in rows for one in row.get(what, [])} == {True, False}, "both happen"


@pytest.mark.parametrize("name", ["merging", "d2o", "kvmerger", "elastic_cache", "one slot"])
def test_the_oracle_sees_a_missing_merge(name: str, tmp_path: Any) -> None:
    told = talk(name, tmp_path)
    told.exit = "drop"
    with pytest.raises(AssertionError):
        told.converse()


@pytest.mark.parametrize("name", ["merging", "d2o", "kvmerger", "elastic_cache", "cam", "razor_attention"])
def test_the_first_call_keeps_what_the_base_keeps(name: str, tmp_path: Any) -> None:
    told = talk(name, tmp_path)
    told.call(torch.ones(2, 40, dtype=torch.bool))
    assert told.same_kept
