"""Many compiled models in one process: each has graphs and a limit of its own, and what is gone is given back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import nest, plain, tiny
from spelling import cache_of

import kvpass
import kvpass.model.dynamo
from kvpass.errors import RecompileError

IDS = tiny.tokens(1, 60)


def evicts(model: Any, slots: int) -> bool:
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, return_dict_in_generate=True)
    return all(site["live_max"] <= slots for site in kvpass.report(cache_of(out)).to_dict()["sites"])


def test_more_models_of_a_class_than_dynamo_has_graphs_for() -> None:
    """Dynamo's limit is 8 graphs for all models of a class together; a budget each makes two graphs for each."""
    model = tiny.llama(layers=1)
    assert all(evicts(kvpass.compile(model, "streaming_llm", slots, inner="eager"), slots) for slots in range(20, 25))
    assert len(kvpass.explain(model, IDS, use_cache=True).tables) == 2


def test_other_peoples_graphs_are_not_counted() -> None:
    other = torch.compile(plain.make(plain.Decoder), backend="eager", dynamic=False)
    ids = plain.tokens(1, 40)
    with torch.no_grad():
        for length in range(10, 20):
            other(ids[:, :length])
        compiled = kvpass.compile(plain.make(plain.Decoder), "h2o", 24, inner="eager")
        cache = nest.run(compiled, ids, 2)
        assert kvpass.report(cache).to_dict()["sites"][0]["live_max"] == 24
        for length in range(20, 30):
            other(ids[:, :length])
        assert bool(compiled(ids[:, :1], cache)[0].isfinite().all())


def test_a_refused_model_spoils_no_other() -> None:
    broken = nest.decoder()
    nest.FAULTS["break inside"](broken.blocks[0])
    for _ in range(3):
        with pytest.raises(kvpass.KVPassError):
            nest.run(kvpass.compile(broken, "h2o", 20, inner="eager"), plain.tokens(1, 40), 2)
    cache = nest.run(kvpass.compile(nest.decoder(), "h2o", 20, inner="eager"), plain.tokens(1, 40), 2)
    assert kvpass.report(cache).to_dict()["sites"][0]["live_max"] == 20


def test_equal_compilations_have_their_graphs_each() -> None:
    model = tiny.llama(layers=1)
    one, two = (kvpass.compile(model, "h2o", 24, inner="eager") for _ in range(2))
    assert evicts(one, 24)
    assert evicts(two, 24)
    assert len(one.kvpass.graphs) == len(two.kvpass.graphs) > 0


class Tagged(torch.nn.Module):
    """A graph for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nest.decoder()

    def forward(self, ids: torch.Tensor, word: str) -> Any:
        logits, cache = self.inner(ids)
        return (logits * 2 if word.endswith("1") else logits), cache


def test_the_limit_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvpass.model.dynamo._WITHIN_A_CALL, "recompile_limit", 4)
    compiled = kvpass.compile(Tagged().eval(), "h2o", 20, inner="eager")
    words = iter(range(100))

    def sweep() -> None:
        for word in words:
            compiled(plain.tokens(1, 30), f"word {word}")

    with torch.no_grad(), pytest.raises(RecompileError, match=r"kwargs|args|word") as caught:
        sweep()
    assert "== 'word" in str(caught.value)
    assert next(words) == 5


def test_graphs_die_with_their_model() -> None:
    compiled = kvpass.compile(tiny.llama(layers=1), "h2o", 24, inner="eager")
    assert evicts(compiled, 24)
    graph = weakref.ref(compiled.kvpass.graphs[0].table)
    del compiled
    gc.collect()
    assert graph() is None
