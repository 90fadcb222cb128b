"""A row of a batch keeps, after every call, what it would keep alone: whatever the padding, in whatever call.

The judge is the library itself with a batch of one and no padding, whose choices the oracle judges elsewhere. Columns
are compared as the row's own tokens, counted from 0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.rank.share_out import ShareOut
from models import tiny
from oracle.ops import DIM, Site, after_call

import kvpass
from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy

HEADS, KV_HEADS, LAYERS = 4, 2, 2

Call = list[int]
"""How many tokens each row gets."""


class Streams:
    """Queries, keys and values of each row's tokens, for each layer; a row's do not depend on its padding."""

    def __init__(self, rows: int, most: int = 400) -> None:
        g = torch.Generator().manual_seed(5)
        self.of = [
            [
                tuple(
                    (1.5 if heads == HEADS else 1.0) * torch.randn(1, heads, most, DIM, generator=g)
                    for heads in (HEADS, KV_HEADS, KV_HEADS)
                )
                for _ in range(LAYERS)
            ]
            for _ in range(rows)
        ]


class Batch:
    """Layers of the library's ops under a policy, fed some rows of the streams; `kept` tells what they hold."""

    def __init__(self, streams: Streams, rows: list[int], policy: Any, budget: float | int) -> None:
        self.streams, self.rows, self.fed = streams, rows, [0] * len(rows)
        g = torch.Generator().manual_seed(1)
        planned = Policy.load(policy).with_budget(budget)
        projections = [torch.randn(24, HEADS * DIM, generator=g) for _ in range(LAYERS)]
        self.sites = [Site(rule_of(planned, at, LAYERS), w) for at, w in enumerate(projections)]
        self.shown = torch.zeros(len(rows), 0, dtype=torch.bool)

    def call(self, own: torch.Tensor) -> None:
        """own: bool [rows, S], where the call's tokens are."""
        start, count = self.shown.shape[1], own.shape[1]
        self.shown = torch.cat([self.shown, own], 1)
        causal = torch.ones(count, start + count, dtype=torch.bool).tril(start)
        mask = causal & self.shown[:, None, None]
        for at, site in enumerate(self.sites):
            tensors = [torch.full((len(own), heads, count, DIM), 9.0) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            for b, row in enumerate(self.rows):
                new = slice(self.fed[b], self.fed[b] + int(own[b].sum()))
                for target, source in zip(tensors, self.streams.of[row][at], strict=True):
                    target[b][:, own[b]] = source[0, :, new]
            (site.one if count == 1 and start else site.many)(*tensors, mask, start)
        angles = 0.7 ** torch.arange(1, DIM // 2 + 1, dtype=torch.float64)
        after_call(self.sites, count > 1 or not start, angles)
        self.fed = [fed + int(new.sum()) for fed, new in zip(self.fed, own, strict=True)]

    def kept(self, b: int) -> list[list[list[int]]]:
        """Numbers of the tokens that each layer and head holds of a row."""
        number = self.shown[b].cumsum(0) - 1
        held = [site.positions()[b] for site in self.sites]
        return [[sorted(number[head[head >= 0].long()].tolist()) for head in layer] for layer in held]


def padded(call: Call, side: str) -> torch.Tensor:
    """Where a call's tokens are, bool [rows, S]: padding in front, behind, or both."""
    width = max(call)
    shift = {"left": lambda n: width - n, "right": lambda n: 0, "middle": lambda n: (width - n) // 2}[side]
    return torch.stack([(torch.arange(width) >= shift(n)) & (torch.arange(width) < shift(n) + n) for n in call])


def same_as_alone(policy: Any, budget: float | int, calls: list[tuple[Call, str]]) -> None:
    rows = range(len(calls[0][0]))
    streams = Streams(len(rows))
    batch = Batch(streams, list(rows), policy, budget)
    alone = [Batch(streams, [row], policy, budget) for row in rows]
    for step, (call, side) in enumerate(calls):
        batch.call(padded(call, side))
        for b in rows:
            if call[b]:
                alone[b].call(torch.ones(1, call[b], dtype=torch.bool))
            assert batch.kept(b) == alone[b].kept(0), f"row {b} after call {step}, {call} {side}"


def turns(*calls: tuple[Call, str, int]) -> list[tuple[Call, str]]:
    """Calls of several tokens, each followed by so many of one."""
    out: list[tuple[Call, str]] = []
    for call, side, steps in calls:
        out += [(call, side), *[([1] * len(call), "left")] * steps]
    return out


CONVERSATIONS = {
    "unequal second turns": turns(([70, 70, 70], "left", 2), ([12, 4, 30], "left", 14)),
    "right padding": turns(([80, 60, 3], "right", 12), ([9, 20, 40], "right", 3)),
    "three turns": turns(([70, 90, 30], "left", 2), ([5, 40, 15], "middle", 4), ([35, 2, 17], "left", 8)),
    "padded steps": [
        *turns(([80, 50, 70], "left", 2)),
        *[([1, 0, 1], "left"), ([0, 1, 1], "left"), ([1, 1, 1], "left")] * 3,
        *turns(([6, 9, 3], "right", 4)),
    ],
    "silent rows": turns(([70, 65, 60], "left", 2), ([10, 0, 7], "left", 3), ([0, 9, 0], "right", 3)),
    "single words": turns(([70, 65, 60], "left", 2), ([8, 1, 5], "left", 3), ([2, 6, 1], "right", 4)),
}

BUDGETS = {"vatp": 64, "nacl": 80, "criticalkv": 96, "critical_ada": 96, "pyramidkv": 64, "ada_pyramid": 64}
"""Where 48 slots leave nothing to choose, beside what is protected."""

MIXED: dict[str, tuple[dict[str, Any], float | int]] = {
    "a growing window": ({"extends": "h2o", "min_slots": 24}, 0.4),
    "heads that share, windows by shares": ({"extends": "ada_snapkv", "protect": {"recent": 0.5}}, 72),
    "average pool": ({"extends": "snapkv", "pool": {"kind": "avg", "size": 5}}, 48),
    "decay": ({"score": "knorm", "decay": True, "protect": {"sinks": 4, "recent": 9}}, 40),
    "a short memory": ({"extends": "corm", "allocate": {"threshold": -20}, "protect": {"recent": 21}}, 64),
    "lazy layers": ({"extends": "simlayerkv", "options": {"recent": 16, "most": 0.3}, "protect": {"recent": 16}}, 64),
    "a share of a pyramid": ({"extends": "pyramidkv"}, 0.6),
    "many sinks": ({"extends": "roco", "protect": {"sinks": 10, "recent": 12}}, 48),
}

LEARNED = {name for name in names() if "file" in str(Policy.load(name).options) or name in (
    "q_filters", "kvp", "trim_kv", "kvzap", "dms", "duo_attention", "razor_attention"
)}  # fmt: skip
NEEDS_MODEL = {"expected_attention", "compactor", "judge_q", "kvzip", "kvzip_plus", "retold"}
"""They read unrotated queries, marks that end a turn, or the prompt again."""
KEEPS_ALL = {name for name in names() if Policy.load(name).keeps_all}
PLAIN = sorted(set(names()) - LEARNED - NEEDS_MODEL - KEEPS_ALL)


def conversations(policy: Any) -> list[list[tuple[Call, str]]]:
    """Where layers share by data a row's single word is not a step: its layers are shared out anew."""
    steady = rule_of(Policy.load(policy).with_budget(96), 0, LAYERS)[ShareOut].share == ""
    return [calls for what, calls in CONVERSATIONS.items() if steady or what != "single words"]


@pytest.mark.parametrize("policy", PLAIN)
@pytest.mark.some(14)
def test_every_policy(policy: str) -> None:
    """Three turns with padding before and around them, and rows that say nothing in a turn."""
    for what in ("three turns", "silent rows"):
        same_as_alone(policy, BUDGETS.get(policy, 48), CONVERSATIONS[what])


PATHS = ["h2o", "tova", "snapkv", "roco", "keydiff", "r_kv", "critical_ada", "cake", "corm", "cascading", "ada_pyramid"]
"""One for each way to rank, to share slots out and to lay keys out; the others in `make wide`."""


@pytest.mark.parametrize(
    "policy", [policy if policy in PATHS else pytest.param(policy, marks=pytest.mark.wide) for policy in PLAIN]
)
@pytest.mark.some(5)
def test_every_conversation(policy: str) -> None:
    for calls in conversations(policy):
        if calls not in (CONVERSATIONS["three turns"], CONVERSATIONS["silent rows"]):
            same_as_alone(policy, BUDGETS.get(policy, 48), calls)


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.some(4)
def test_what_policies_can_say(policy: str) -> None:
    spec, budget = MIXED[policy]
    for calls in conversations({"name": "mine", **spec}):
        same_as_alone({"name": "mine", **spec}, budget, calls)


GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}


def answers(model: Any, ids: torch.Tensor, mask: torch.Tensor, past: Any) -> Any:
    given = {} if past is None else {"cache" if "cache" in past else "past_key_values": cache_of(past)}
    return model.generate(ids, attention_mask=mask, **given, **GREEDY)


def cache_of(out: Any) -> Any:
    return out["cache"] if "cache" in out else out["past_key_values"]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["h2o", "ada_snapkv"])
def test_a_chat_in_a_batch(policy: str) -> None:
    """Through a compiled model and generate: answers and kept tokens, after turns of 11 and 3 tokens, 2 and 9."""
    compiled = kvpass.compile(tiny.one_llama(4, 2), policy, 48, inner="eager")
    asked = [[torch.randint(1, 60, (1, n), generator=torch.Generator().manual_seed(10 * n + b))
              for b, n in enumerate(lengths)] for lengths in ((100, 100), (11, 3), (2, 9))]  # fmt: skip
    spoken, shown, out = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), None
    alone: list[Any] = [(torch.zeros(1, 0, dtype=torch.long), None)] * 2
    for turn in asked:
        width = max(words.shape[1] for words in turn)
        new = torch.cat([torch.nn.functional.pad(words, (width - words.shape[1], 0)) for words in turn])
        shown = torch.cat([shown, (new != 0).long()], 1)
        out = answers(compiled, torch.cat([spoken, new], 1), shown, out)
        spoken = out["sequences"]
        shown = torch.cat([shown, torch.ones(2, spoken.shape[1] - shown.shape[1], dtype=torch.long)], 1)
        held = [view.positions for view in kvpass.inspect(cache_of(out)).layers]
        for b, words in enumerate(turn):
            said, past = alone[b]
            ids = torch.cat([said, words], 1)
            one = answers(compiled, ids, torch.ones_like(ids), past)
            alone[b] = one["sequences"], one
            assert torch.equal(spoken[b, -20:], one["sequences"][0, -20:]), f"row {b}, turn {turn}"
            number = shown[b].cumsum(0) - 1
            for layer, view in zip(held, kvpass.inspect(cache_of(one)).layers, strict=True):
                for ours, theirs in zip(layer[b], view.positions[0], strict=True):
                    assert number[ours[ours >= 0]].tolist() == theirs[theirs >= 0].tolist()
