"""Models that demote: logits and whole tokens are the oracle's, no token goes, and bytes are what was asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kvpass.kernels.budget import within
from kvpass.kernels.codecs.storage import WHOLE_AT
from models import tiny
from models.turns import GREEDY, beams
from oracle.chat import HEAD_DIM, CodedChat, gentle
from oracle.coded import Held
from oracle.hf import Oracle
from oracle.tiers import TieredSimulator
from spelling import cache_of, with_cache
from transformers import DynamicCache

import kvpass
from kvpass.api.holdings import stores
from kvpass.errors import PolicyError

INT4 = Held("int4", "int4", True, 8)


def spec(policy: str, held: Held = INT4, **fields: Any) -> dict[str, Any]:
    store = {"rotate": "hadamard" if held.rotate else "none", "group": held.group}
    to = {"k": held.k, "v": held.v}
    return {"name": "mine", "extends": policy, "store": store, "evicted": {"to": to}, "min_slots": 8, **fields}


class Chat(CodedChat):
    def __init__(self, policy: str, budget: float | int, **options: Any) -> None:
        compiled = kvpass.compile(gentle(), spec(policy), budget, inner="eager", **options)
        simulator = TieredSimulator(policy, budget, 8, 2.0**-9, held=INT4)
        super().__init__(compiled, Oracle(gentle(), policy, budget, 8), simulator)

    def follow(self) -> None:
        """It is told which tokens are whole; all of them stay."""
        assert self.mask is not None
        held = stores(self.cache)
        self.simulator.follow([store.state[WHOLE_AT] for store in held])
        for store, view in zip(held, kvpass.inspect(self.cache).layers, strict=True):
            for b, row in enumerate(self.mask):
                tokens = row.nonzero().flatten().tolist()
                for h in range(2):
                    assert view.positions[b, h][view.positions[b, h] >= 0].tolist() == tokens
                    assert int((store.state[WHOLE_AT][b, h] >= 0).sum()) == within(store.rule, len(tokens))


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("policy", "budget"), [("h2o", 0.25), ("h2o", 20), ("snapkv", 40)])
@pytest.mark.some(2)
def test_a_conversation(policy: str, budget: float | int) -> None:
    """`h2o`, a quarter of the current length: what mikv is, but for the rotation."""
    chat = Chat(policy, budget, verify=policy == "snapkv")
    chat.converse()
    assert chat.simulator.compared == 20 * 2 * 2 * 2
    chat.check()


@pytest.mark.usefixtures("one_trace")
def test_a_copy_goes_its_own_way() -> None:
    """A deep copy demotes its own tokens."""
    chat = Chat("h2o", 0.25)
    token = chat.decode(chat.call(tiny.tokens(2, 40)), 3)
    twin = copy.deepcopy(chat.cache)
    with torch.no_grad():
        for one in tiny.tokens(2, 8, seed=5).split(1, dim=1):
            chat.model(one, **with_cache(chat.model, twin), use_cache=True)
    chat.decode(token, 4)
    chat.check()
    assert kvpass.report(twin).to_dict()["tokens"] == 40 + 3 + 8


def test_generate_and_its_report() -> None:
    """mikv as it is: a fifth of the current length is whole, and what is held is what the report says."""
    ids, mask = tiny.left_padded([70, 45])
    out = kvpass.compile(gentle(), "mikv", inner="eager").generate(
        ids, attention_mask=mask, max_new_tokens=20, **GREEDY
    )
    held, report = stores(cache_of(out)), kvpass.report(cache_of(out)).to_dict()
    assert report["budget"] == 0.2
    for store, row in zip(held, report["sites"], strict=True):
        state = store.state
        assert store.live().tolist() == [[89, 89], [64, 64]]
        assert (state[WHOLE_AT] >= 0).sum(-1).tolist() == [[17, 17], [12, 12]]
        assert state.places <= 17 + 1
        codes = 2 * (HEAD_DIM // 4 + 2 * 2 * 2)  # keys and values: two bits an entry, two groups of a scale and a low
        balancer = HEAD_DIM * 4
        assert row["bytes"] == 4 * (state.slots * codes + state.places * 2 * HEAD_DIM * 4 + balancer)
        assert row["overhead_bytes"] == 4 * (state.slots * 8 + state.places * 4 + 16)
    assert report["proof"]["evicted"] == 0
    assert report["proof"]["demoted"] == 2 * 2 * (89 - 17 + 64 - 12)
    assert "0 of 612 keys evicted, 496 demoted" in str(kvpass.report(cache_of(out)))


def test_a_share_of_the_bytes() -> None:
    """Codes, copies, positions and sums together, after all of them have grown."""
    compiled = kvpass.compile(gentle(), spec("h2o"), "60% bytes", inner="eager")
    out = compiled.generate(tiny.tokens(2, 330), max_new_tokens=70, **GREEDY)
    report = kvpass.report(cache_of(out)).to_dict()
    share = (report["slot_bytes"] + report["overhead_bytes"]) / report["dense_bytes"]
    assert abs(share - 0.6) <= 0.03 * 0.6
    assert report["proof"]["demoted"] > 0


def test_beams_take_their_copies_along() -> None:
    """Eight bits for a few: the model's own sequences."""
    compiled = kvpass.compile(gentle(), spec("h2o", Held("int8", "int8", True, 16)), 0.5, inner="eager")
    assert torch.equal(beams(compiled, 8), beams(gentle(), 8))


def test_inductor_and_static_caches_change_nothing() -> None:
    model, (ids, mask) = tiny.llama(layers=1), tiny.left_padded([60, 35])
    options = [("eager", {}), ("inductor", {}), ("eager", {"cache_implementation": "static"})]
    outs = [
        kvpass.compile(model, spec("h2o"), 0.25, inner=inner).generate(
            ids, attention_mask=mask, max_new_tokens=8, **GREEDY, **extra
        )
        for inner, extra in options
    ]
    whole = [stores(cache_of(out))[0].state[WHOLE_AT].sort(-1).values for out in outs]
    for out, at in zip(outs[1:], whole[1:], strict=True):
        assert torch.equal(out.sequences, outs[0].sequences)
        assert torch.equal(at[at >= 0], whole[0][whole[0] >= 0])


def test_codes_alone_are_more_than_asked() -> None:
    compiled = kvpass.compile(gentle(), spec("h2o"), "20% bytes", inner="eager")
    with pytest.raises(PolicyError, match="the codes of all tokens hold more than 20% bytes") as error:
        compiled.generate(tiny.tokens(1, 30), max_new_tokens=2, **GREEDY)
    assert "ask for more than" in str(error.value)


@pytest.mark.usefixtures("one_trace")
def test_tokens_that_the_caller_drops_or_keeps() -> None:
    """What is dropped leaves its slot, whole or not; what must stay is whole for good."""
    compiled = kvpass.compile(gentle(), spec("h2o", protect={"tokens": True}), 10, inner="eager")
    cache = DynamicCache(config=gentle().config)
    drop, keep = torch.zeros(2, 40, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.bool)
    drop[:, 12:17], keep[0, 5], keep[1, 20:23] = True, True, True
    with torch.no_grad():
        with kvpass.marked(drop=drop, keep=keep):
            compiled(tiny.tokens(2, 40), **with_cache(compiled, cache), use_cache=True)
        for length in (1, 1, 1, 6, 1, 1):
            out = compiled(tiny.tokens(2, length), **with_cache(compiled, cache), use_cache=True)
    assert bool(out.logits.isfinite().all())
    there = [n for n in range(51) if not 12 <= n < 17]
    for store, view in zip(stores(cache), kvpass.inspect(cache).layers, strict=True):
        assert view.positions.tolist() == [[there, there]] * 2
        for b, kept in enumerate(([5], [20, 21, 22])):
            for at in store.state[WHOLE_AT][b]:
                assert int((at >= 0).sum()) == 10
                assert set(kept) <= set(at.tolist())
                assert set(at[at >= 0].tolist()) <= set(there)
