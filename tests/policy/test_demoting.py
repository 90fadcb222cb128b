"""What a policy may say of tokens that are demoted, and what it may not."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import Budget, within
from kvpass.kernels.codecs.storage import Storage

from kvpass.errors import PolicyError
from kvpass.plan.byte_budget import Entry, bytes_of, copy_bytes
from kvpass.plan.rule import rule_of
from kvpass.policy.evicted import To
from kvpass.policy.policy import Policy
from kvpass.runtime.room import empty_state

INT2 = {"to": "int2"}


def policy(**said: Any) -> Policy:
    return Policy.load({"name": "mine", "extends": "h2o", **said})


def test_one_word_is_both_halves() -> None:
    short, written = policy(evicted=INT2), policy(evicted={"to": {"k": "int2", "v": "int2"}})
    assert short == written
    assert short.evicted.to == To("int2", "int2")
    assert rule_of(short.with_budget(0.2))[Storage] == Storage("int2", "int2", 64, rotated=True, by_score=True)
    assert policy(evicted={"to": {"k": "int4"}}).evicted.to == To("int4", "dense")


def test_other_bits_by_extension() -> None:
    """`mikv` in 3 bits, and values in 4."""
    own = Policy.load({"name": "mine", "extends": "mikv", "evicted": {"to": "int3"}})
    assert own.evicted.to == To("int3", "int3")
    own = Policy.load({"name": "mine", "extends": "mikv", "evicted": {"to": {"v": "int4"}}})
    assert own.evicted.to == To("int2", "int4")
    assert Policy.load({"name": "mine", "extends": "mikv", "evicted": "drop"}).evicted.to is None


def test_the_budget_is_of_whole_tokens() -> None:
    rule = rule_of(policy(evicted=INT2, min_slots=10).with_budget(0.25))
    assert rule[Budget] == rule_of(policy(min_slots=10).with_budget(0.25))[Budget]
    assert [within(rule, n) for n in (5, 30, 40, 100)] == [5, 10, 10, 25]
    assert rule.demotes
    assert not rule.drops
    assert not rule_of(policy(evicted=INT2).with_budget(1.0)).demotes, "everything is whole"


def test_groups_are_shares_of_a_key() -> None:
    for group, width, entries in ((0.5, 128, 64), (0.5, 80, 40), (1.0, 64, 64), (0.01, 64, 1), (16, 128, 16)):
        planned = policy(evicted=INT2, store={"group": group}).with_budget(0.2)
        assert rule_of(planned, entry=Entry(width, width, torch.float16))[Storage].scale_group == entries


@pytest.mark.parametrize(
    ("said", "field", "fix"),
    [
        ({"evicted": {"to": "itn2"}}, "evicted.to.k", "did you mean 'int2'"),
        ({"evicted": {"to": {"k": "int2", "v": "int5"}}}, "evicted.to.v", "known: dense, int8"),
        ({"evicted": {"to": {"q": "int2"}}}, "evicted.to.q", "valid here: k, v"),
        ({"evicted": {"to": "dense"}}, "evicted.to", "name a codec"),
        ({"evicted": {"to": 2}}, "evicted.to", "give"),
        ({"evicted": {"to": "int2", "merge": {}}}, "evicted", "leave one of both out"),
        ({"evicted": INT2, "store": "int8"}, "store", "leave store.k and store.v out"),
        ({"evicted": INT2, "store": {"residual": 8}}, "store.residual", "protect.recent"),
        ({"evicted": INT2, "store": {"sinks": 0}}, "store.sinks", "protect.sinks"),
        ({"evicted": INT2, "every": 4}, "every", "leave every out"),
        ({"evicted": INT2, "when": "calls"}, "when", "leave when out"),
        ({"evicted": INT2, "positions": "reindexed"}, "positions", "evicted.to.k: dense"),
        ({"evicted": INT2, "extends": "ada_snapkv"}, "allocate", "equally many tokens whole"),
        ({"evicted": INT2, "extends": "layer_defensivekv"}, "allocate", "equally many tokens whole"),
        ({"evicted": INT2, "extends": "corm"}, "allocate", "equally many tokens whole"),
        ({"evicted": INT2, "extends": "cascading"}, "allocate.rings", "leave allocate.rings out"),
        ({"evicted": INT2, "extends": "nacl"}, "sample", "leave sample out"),
        ({"evicted": INT2, "extends": "fair"}, "fair", "leave fair out"),
    ],
    ids=str,
)
def test_what_is_refused(said: dict[str, Any], field: str, fix: str) -> None:
    with pytest.raises(PolicyError, match=field) as error:
        policy(**said)
    assert fix in str(error.value)


ENTRIES = [Entry(64, 64, torch.float32), Entry(128, 128, torch.bfloat16), Entry(80, 40, torch.float16)]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_share_of_the_bytes(entry: Entry, share: float) -> None:
    """Counted tensor by tensor, within 3 %: the codes of all tokens, and as many whole copies as are left."""
    rule = rule_of(policy(evicted=INT2, min_slots=1).with_budget(f"{100 * share:g}% bytes"), entry=entry)
    tokens = 8000
    state = empty_state(
        rule, tokens, torch.empty(0, dtype=entry.dtype), {"B": 2, "Hkv": 3, "D": entry.d, "Dv": entry.v}
    )
    held = sum(t.nbytes for t in state.tensors())
    dense = 2 * 3 * tokens * (entry.d + entry.v) * entry.dtype.itemsize
    assert abs(held / dense - share) <= 0.03 * share
    assert 0 < within(rule, tokens) < tokens


def test_bytes_of_a_token_and_of_a_copy() -> None:
    entry = Entry(64, 64, torch.float16)
    rule = rule_of(policy(evicted=INT2).with_budget(0.2), entry=entry)
    assert bytes_of(rule, entry) == (2 * (16 + 2 + 2) + 4 + 4, 16)
    assert copy_bytes(rule, entry) == 2 * 64 * 2 + 4


def test_too_few_bytes() -> None:
    """Two bits, scales, position and sum are 48 of 256 bytes, and 2.5 % of them are free."""
    planned = policy(evicted=INT2).with_budget("15% bytes")
    rule_of(planned, entry=Entry(64, 64, torch.float32))
    with pytest.raises(PolicyError, match="hold more than 15% bytes") as error:
        rule_of(planned, entry=Entry(64, 64, torch.float16))
    least = 100 * Fraction(48, 256) * Fraction(41, 40)
    assert f"more than {float(least):.3g}%" in str(error.value)


def test_layers_that_drop() -> None:
    planned = policy(evicted=INT2, layers={"0": {"evicted": "drop"}}).with_budget(0.2)
    assert [rule_of(planned, layer, 2).demotes for layer in range(2)] == [False, True]
