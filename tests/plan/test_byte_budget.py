"""A budget in bytes as one in slots: what the state of a site then holds, counted here tensor by tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import budget
from oracle import codes

from kvpass.plan.byte_budget import Entry, bytes_of
from kvpass.plan.rule import rule_of
from kvpass.policy.policy import Policy
from kvpass.runtime.room import empty_state

FLOAT32, HALF = Entry(64, 64, torch.float32), Entry(128, 128, torch.bfloat16)


def coded_bytes(name: str, width: int, group: int) -> int:
    """Of one vector as codes."""
    if name == "mixed_2_1":
        first = math.ceil(width / 2)
        return coded_bytes("int2", first, group) + math.ceil((width - first) / 8) + 4 * math.ceil(first / group)
    groups = math.ceil(width / group)
    scales = 2 * groups * (2 if name in codes.ASYMMETRIC else 1)
    if name in codes.LEVELS and name not in codes.NORMAL:
        return 2 * width if name == "float16" else math.ceil(width / 5) + scales
    return math.ceil(width * codes.bits_of(name) / 8) + scales


@pytest.mark.parametrize("entry", [FLOAT32, HALF, Entry(80, 40, torch.float16)], ids=["float32", "bf16", "two widths"])
@pytest.mark.parametrize(
    "store", ["dense", "int4", {"k": "int8"}, {"v": "fp8_e4m3", "group": 48}, {"k": "int2", "v": "int4_symmetric"}]
)
@pytest.mark.parametrize(("policy", "statistics", "columns"), [("h2o", 1, 4), ("snapkv", 2, 4), ("ada_snapkv", 2, 6)])
def test_bytes_of_a_slot(policy: str, statistics: int, columns: int, store: Any, entry: Entry) -> None:
    planned = Policy.load({"name": "x", "extends": policy, "store": store}).with_budget("20% bytes")
    slot, apart = 4 + 4 * statistics, 4 * columns
    whole = 0
    for name, width in ((planned.store.k, entry.d), (planned.store.v, entry.v)):
        if name == "dense":
            slot += width * entry.dtype.itemsize
        else:
            slot += coded_bytes(name, width, planned.store.group)
            whole += 36 * width * entry.dtype.itemsize
    apart += whole + (36 * 4 if whole else 0)
    assert bytes_of(rule_of(planned, entry=entry), entry) == (slot, apart)


@pytest.mark.parametrize("entry", [FLOAT32, HALF, Entry(80, 40, torch.float16)], ids=["float32", "bf16", "two widths"])
@pytest.mark.parametrize(
    ("fits", "held", "of_head"),
    [
        ({"k": "int4", "fit_k": "balance"}, 1.0, lambda d, v: 4 * d),
        ({"k": "int2", "v": "int2", "fit_k": "range", "fit_v": "range"}, 1.0, lambda d, v: 8 * (d + v)),
        ({"k": "float16", "fit_k": "channels", "channels": 0.7}, 0.7, lambda d, v: 2 * (7 * d // 10)),
        ({"k": "int4", "fit_k": "channels", "channels": 0.29}, 0.29, lambda d, v: 2 * (29 * d // 100)),
        ({"k": "mixed_2_1", "v": "ternary", "fit_k": "spread", "fit_v": "range"}, 1.0, lambda d, v: 10 * d + 8 * v),
    ],
    ids=["balance", "range", "channels", "few channels", "spread"],
)
def test_bytes_of_fits(fits: Any, held: float, of_head: Any, entry: Entry) -> None:
    """Beside the slots of each head; of channels only those that are kept are in a slot."""
    spec = {"name": "x", "extends": "h2o", "store": {**fits, "rotate": "none"}}
    planned = Policy.load(spec).with_budget("20% bytes")
    width, slot, whole = int(held * entry.d + 1e-9), 8, 0
    for name, own, full in ((planned.store.k, width, entry.d), (planned.store.v, entry.v, entry.v)):
        slot += full * entry.dtype.itemsize if name == "dense" else coded_bytes(name, own, 64)
        whole += 0 if name == "dense" else 36 * full * entry.dtype.itemsize
    apart = 16 + 36 * 4 + whole + of_head(entry.d, entry.v)
    assert bytes_of(rule_of(planned, entry=entry), entry) == (slot, apart)


@pytest.mark.parametrize("entry", [FLOAT32, HALF], ids=["float32", "bf16"])
@pytest.mark.parametrize("store", ["dense", "int4", "int8", {"k": "int2", "v": "int2", "residual": 0, "sinks": 0}])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "roco", "ada_snapkv", "streaming_llm"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_whole_state_is_the_share(policy: str, store: Any, entry: Entry, share: float) -> None:
    """Within 3 % of what an unmodified cache of 8,000 tokens holds; never more slots than tokens."""
    spec = {"name": "x", "extends": policy, "store": store, "min_slots": 40}
    rule = rule_of(Policy.load(spec).with_budget(f"{100 * share:g}% bytes"), entry=entry)
    tokens, like = 8000, torch.empty(0, dtype=entry.dtype)
    state = empty_state(rule, tokens, like, {"B": 3, "Hkv": 2, "D": entry.d, "Dv": entry.v})
    held = sum(t.nbytes for t in state.tensors())
    dense = 3 * 2 * tokens * (entry.d + entry.v) * entry.dtype.itemsize
    if budget(rule, tokens) >= tokens:
        assert held <= 1.03 * share * dense
    else:
        assert abs(held / dense - share) <= 0.03 * share


def test_codes_that_fit_leave_room_for_whole_tokens_first() -> None:
    """All codes are less than the share, codes and whole copies are more of it until there are many tokens."""
    rule = rule_of(Policy.load({"name": "x", "extends": "h2o", "store": "int4"}).with_budget("20% bytes"))
    slot, apart = bytes_of(rule, FLOAT32)
    assert slot < 0.2 * 512
    assert rule.evicts
    for tokens in (100, 300, 700, 1500, 20_000):
        kept = min(budget(rule, tokens), tokens)
        assert kept == 64 or kept * slot + apart <= 0.2 * 512 * tokens
    assert budget(rule, 700) < 700
    assert budget(rule, 20_000) > 20_000


@pytest.mark.parametrize("when", ["calls", "first"])
def test_calls_that_evict_nothing_have_room_for_all(when: str) -> None:
    spec = {"name": "x", "extends": "h2o", "store": "int4", "when": when}
    rule = rule_of(Policy.load(spec).with_budget("10% bytes"))
    assert budget(rule, 1000) < 1000
    assert budget(rule.of_steps, 1000) == 1000
    assert not rule.of_steps.evicts


def test_codes_keep_more_tokens_of_the_same_bytes() -> None:
    kept = [
        budget(rule_of(Policy.load({"name": "x", "extends": "h2o", "store": s}).with_budget("10% bytes")), 8000)
        for s in ("dense", "int8", "int4", "int2")
    ]
    assert kept == sorted(kept)
    assert kept[0] == pytest.approx(800, rel=0.05)
    assert kept[2] > 5 * kept[0]
