"""Layers that differ: each keeps what its own policy says, and bytes are the sum of the layers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from oracle.base import Budget
from oracle.base import Policy as Meaning
from oracle.drive import Conversation
from oracle.held import Knorm
from oracle.policies import AdaSnapKV, SnapKV, StreamingLLM
from oracle.simulator import Simulator
from spelling import cache_of

import kvpass
from kvpass.api.cli import main
from kvpass.errors import PolicyError
from kvpass.policy.layers import of_layer
from kvpass.policy.policy import Policy

pytestmark = pytest.mark.usefixtures("one_trace")

FILE = """
name: mixed
extends: snapkv
layers:
  "0-1": {budget: 1.0}
  2: {extends: knorm, budget: 36}
  3: {allocate: {heads: flat}}
  "-1": {extends: streaming_llm}
"""


class Mixed(Simulator):
    """A policy and a budget for each layer."""

    def __init__(self, parts: list[tuple[Meaning, float | int]]) -> None:
        super().__init__(parts[0][0])
        self.parts = [(policy, Budget.of(budget)) for policy, budget in parts]

    def enter(self, index: int, sees: torch.Tensor, kv_heads: int) -> torch.Tensor:
        self.policy, self.budget = self.parts[index]
        return super().enter(index, sees, kv_heads)


def test_each_layer_has_its_own(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(FILE)
    assert main(["policies", "check", str(file), "--budget", "48"]) == 0
    conversation = Conversation(tiny.one_llama(6, 2, layers=6), str(file), 48, meaning=SnapKV(), inner="eager")
    parts = [(SnapKV(), 1.0), (SnapKV(), 1.0), (Knorm(), 36), (AdaSnapKV(), 48), (SnapKV(), 48), (StreamingLLM(), 48)]
    for policy, _ in parts:
        policy.steady = True
    old, conversation.oracle.simulator = conversation.simulator, Mixed(parts)
    conversation.simulator.outward, conversation.simulator.depth = old.outward, old.depth
    token = conversation.call(tiny.tokens(2, 100))
    token = conversation.decode(token, 9)
    conversation.call(torch.cat([token, tiny.tokens(2, 20, seed=1)], 1))
    conversation.decode(token, 3)
    assert conversation.simulator.near_ties <= 0.005 * conversation.simulator.compared
    held = [int((view.positions >= 0).sum()) for view in kvpass.inspect(conversation.cache).layers]
    tokens = kvpass.report(conversation.cache).to_dict()["tokens"]
    assert held == [2 * 2 * n for n in (tokens, tokens, 36, 48, 48, 48)]


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        ({"0-2": {}}, "of 2 layers"),
        ({"0": {}, "-2": {"budget": 40}}, "is in two entries"),
        ({"-3": {}}, "of 2 layers"),
    ],
    ids=["beyond", "twice", "before"],
)
def test_layers_that_are_not_there(layers: dict[str, Any], what: str) -> None:
    compiled = kvpass.compile(
        tiny.one_llama(4, 2), {"name": "mine", "extends": "h2o", "layers": layers}, 48, inner="eager"
    )
    with torch.no_grad(), pytest.raises(PolicyError, match=what):
        compiled(tiny.tokens(1, 60))


def test_what_a_layer_extends_is_read_once(tmp_path: Any) -> None:
    """A file changed after loading changes nothing; one that tells layers apart itself is refused."""
    (tmp_path / "inner.yaml").write_text("name: inner\nextends: knorm\nmin_slots: 70\n")
    (tmp_path / "mine.yaml").write_text("name: mine\nextends: h2o\nlayers: {'0': {extends: inner.yaml}}\n")
    mine = Policy.load(tmp_path / "mine.yaml").with_budget(0.2)
    (tmp_path / "inner.yaml").write_text("name: inner\nextends: knorm\nlayers: {'0': {budget: 1.0}}\n")
    first, second = of_layer(mine, 0, 2), of_layer(mine, 1, 2)
    assert (first.min_slots, first.score, first.budget, second.score) == (70, "knorm", 0.2, "sum")
    with pytest.raises(PolicyError, match="tells layers apart itself"):
        Policy.load(tmp_path / "mine.yaml")


def test_a_layers_impossible_budget_names_the_layer() -> None:
    with pytest.raises(PolicyError, match=r"layers\.0"):
        Policy.load({"name": "mine", "extends": "h2o", "layers": {"0": {"protect": {"sinks": 99}}}}).with_budget(0.2)


def test_entries_that_say_the_same_may_meet() -> None:
    """A preset names the first and the last two layers; a model of three has one in both."""
    layers = {"0-1": {"budget": 40}, "-2": {"budget": 40}, "-1": {"budget": 40}}
    compiled = kvpass.compile(
        tiny.one_llama(4, 2, layers=3), {"name": "mine", "extends": "h2o", "layers": layers}, 48, inner="eager"
    )
    with torch.no_grad():
        out = compiled(tiny.tokens(1, 60))
    held = [int((view.positions >= 0).sum()) for view in kvpass.inspect(cache_of(out)).layers]
    assert held == [2 * 40] * 3
