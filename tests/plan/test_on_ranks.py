"""Rules of layers whose heads lie on several ranks: who asks the others, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import Budget
from kvpass.kernels.errors import RanksError
from kvpass.kernels.rank.lone import check_single
from kvpass.kernels.rank.scorers.registry import encode_options, scorers
from kvpass.kernels.rank.scorers.trial import _made_up
from kvpass.kernels.rank.share_out import ShareOut
from kvpass.kernels.ranks import Ranks, gathered, own_part
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.ragged import Ragged
from models import states
from torch import fx

from kvpass.errors import PolicyError
from kvpass.plan.on_ranks import check_exchanges, on_ranks
from kvpass.plan.rule import rule_of
from kvpass.policy.load import names
from kvpass.policy.policy import Policy
from kvpass.runtime.sharded import Sharded

PART = Sharded(1, 2, "tp group", frozenset({(8, 4)}))

OVER_HEADS = {
    *("tova", "elastic_cache", "chunkkv", "windowkv"),  # one ranking
    *("ada_snapkv", "ada_pyramid", "critical_ada", "defensivekv", "duo_attention", "razor_attention"),  # one budget
    *("layer_defensivekv", "cake", "kvpass"),  # over layers
    *("compactor", "simlayerkv"),  # one score
    "d2o",  # one bar
}
"""Policies that look over the heads of a layer, as their papers say."""
BY_NUMBER = {"random", "nacl", "cam", "keyformer", "q_filters", "kvp", "kvzap", "trim_kv", "dms"}
"""Those for which it matters which head one is: chance, and weights of their own."""

REPLAYED = {"kvzip", "kvzip_plus", "retold"}
"""Those whose prompts are read again, which ranks do not do together yet."""


def site(heads: int = 4, kv_heads: int = 2) -> Any:
    return SimpleNamespace(dims={"Hq": heads, "Hkv": kv_heads}, name="layers.0", source="model.py:1")


def ruled(policy: Any, part: Sharded | None = PART, **sizes: int) -> Rule:
    return on_ranks(policy, rule_of(policy, 1, states.LAYERS), site(**sizes), part)


@pytest.mark.parametrize("name", sorted(REPLAYED))
def test_who_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="reads prompts again, which is not built where heads lie on several ranks"):
        ruled(states.policy(name))


@pytest.mark.parametrize("name", [name for name in names() if name not in REPLAYED])
def test_who_asks_other_ranks(name: str) -> None:
    policy = states.policy(name)
    alone, rule = ruled(policy, None), ruled(policy)
    if name not in OVER_HEADS | BY_NUMBER:
        assert rule.encode() == alone.encode()  # nothing is compiled anew, and nothing exchanged
        return
    assert rule[Ranks] == Ranks(2, 1, "tp%20group")
    assert Rule.parse(rule.encode()) == rule
    heads_share = alone[Ragged].ragged and not alone[ShareOut].share
    assert rule[ShareOut].share == ("heads" if heads_share else alone[ShareOut].share)


def test_layers_that_are_whole_on_each_rank_ask_nobody() -> None:
    policy = Policy.load("tova").with_budget(16)
    assert ruled(policy, heads=8, kv_heads=4) == ruled(policy, None)


@pytest.mark.parametrize(
    ("sizes", "part", "says"),
    [
        ({"heads": 4, "kv_heads": 4}, PART, "4 query heads and 4 KV heads on this rank"),
        ({}, Sharded(0, 2, "0"), "no config"),
        ({}, Sharded(0, 2, "0", frozenset({(8, 4), (4, 2)})), "neither"),
    ],
    ids=["a KV head on two ranks", "no config", "two readings"],
)
def test_heads_that_cannot_be_placed(sizes: dict[str, int], part: Sharded, says: str) -> None:
    for name in ("tova", "h2o"):  # no rank sees all queries of a KV head: nobody's statistics are those of one process
        with pytest.raises(PolicyError, match=says) as error:
            ruled(Policy.load(name).with_budget(16), part, **sizes)
        assert "layers.0" in error.value.where
        assert error.value.hint


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"extends": "ada_snapkv", "every": 8}, "between calls"),
        ({"extends": "am_fast", "allocate": {"heads": "flat"}}, "fits slots"),
    ],
)
def test_what_is_not_built(spec: dict[str, Any], says: str) -> None:
    policy = Policy.load({"name": "mine", **spec}).with_budget(64)
    ruled(policy, None)
    with pytest.raises(PolicyError, match=f"{says}.*several ranks"):
        ruled(policy)


def test_a_graph_of_a_part_of_nobody_knows_which_model() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")))
    parted, whole = fx.GraphModule({}, graph), fx.symbolic_trace(torch.nn.Identity())
    tova, h2o = (Policy.load(name).with_budget(16) for name in ("tova", "h2o"))
    with pytest.raises(PolicyError, match="part of a model"):
        check_exchanges(parted, tova, [ruled(tova, None)], None)
    for gm, policy, part in ((whole, tova, None), (parted, h2o, None), (parted, tova, PART)):
        check_exchanges(gm, policy, [ruled(policy, None)], part)


@pytest.mark.parametrize("name", [name for name, scorer in scorers().items() if scorer.each])
def test_scorers_of_each_head_score_two_heads_as_four(name: str) -> None:
    scorer = scorers()[name]
    four = _made_up(scorer, 64, heads=4)
    split = {"pos", "candidate", "end", "first", "seen", "budget", "k", "v", "rows", "stay"}
    for heads in (slice(0, 2), slice(2, 4)):
        given = {key: x[:, heads] if key in split and x is not None else x for key, x in vars(four).items()}
        given["statistics"] = {key: x[:, heads] for key, x in four.statistics.items()}
        given["q"] = None if four.q is None else four.q[:, 2 * heads.start : 2 * heads.stop]
        two = type(four)(**given)
        assert torch.equal(scorer.score(two, encode_options({})), scorer.score(four, encode_options({}))[:, heads])


def test_a_rank_takes_its_own_heads_and_asks_its_own_group() -> None:
    rule, x = Rule(Ranks(2, 1, "nobody")), torch.arange(8).view(2, 4)
    assert own_part(x, rule).tolist() == [[2, 3], [6, 7]]
    assert own_part(x, Rule()) is x
    assert gathered(x, Rule()) is x
    with pytest.raises(RanksError, match="rank 1 of 2 of a process group 'nobody'"):
        gathered(x, rule)


def test_a_single_token_beside_several_is_refused_where_ranks_share() -> None:
    rule = Rule(Budget(8), Ragged(True), ShareOut("heads"), Ranks(2, 0, "0"))
    valid, cursor = torch.tensor([[True, True], [False, True]]), torch.tensor([9, 9, 9, 0, 0, 0]).repeat(2, 2, 1)
    with pytest.raises(RanksError, match="one token"):
        check_single(valid, cursor, rule)
    check_single(valid[:1], cursor[:1], rule)
    check_single(valid, torch.zeros_like(cursor), rule)  # a prompt of one token
    check_single(valid, cursor, Rule(Budget(8), Ragged(True)))
