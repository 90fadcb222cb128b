"""A later call that is shorter than a policy's `shortest` is as if its tokens had been generated, row by row."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import tiny
from oracle.base import Policy
from oracle.drive import Conversation
from oracle.held import RKV
from oracle.reach import Reach

import kvpass
from kvpass.errors import PolicyError

SHORTEST = 32


class Near(Reach):
    """Far is what is 16 tokens away: these conversations are short."""

    near, shortest = 16, SHORTEST


class Kept(Near):
    when = "calls"


class Similar(RKV):
    shortest = SHORTEST


NEAR = {"extends": "kvpass", "options": {"near": 16}, "shortest": SHORTEST}
CASES: dict[str, tuple[dict[str, Any], Policy]] = {
    "heads of all layers share": (NEAR, Near()),
    "steps evict nothing": ({**NEAR, "when": "calls"}, Kept()),
    "every head as many slots": ({"extends": "r_kv", "shortest": SHORTEST}, Similar()),
}


@functools.cache
def model() -> Any:
    return tiny.llama(6, 2, layers=3)


def talk(spec: dict[str, Any], meaning: Policy) -> Conversation:
    """Prompts of 150 and 110 tokens; questions of 20 and 40, of which the second is judged; steps; both short."""
    own = Conversation(model(), {"name": "mine", **spec}, 48, meaning, inner="eager")
    generator = torch.Generator().manual_seed(3)
    for lengths in ([150, 110], [20, 40], [1, 1], [1, 1], [9, 30], [1, 1], [70, 60], [1, 1]):
        width = max(lengths)
        mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
        ids = torch.randint(1, model().config.vocab_size, (2, width), generator=generator)
        own.call(ids * mask, mask)
    return own


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("case", CASES)
def test_a_question_is_as_generated_tokens(case: str) -> None:
    """Kept positions, heads and rows, are the oracle's after every call."""
    simulator = talk(*CASES[case]).simulator
    assert simulator.compared == 8 * 3 * 2 * 2
    assert simulator.near_ties <= 0.005 * simulator.compared


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("case", CASES)
def test_one_that_judges_by_it_is_caught(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, meaning = CASES[case]
    monkeypatch.setattr(type(meaning), "shortest", 1)
    with pytest.raises(AssertionError, match=r"step .* layer.* row .*: |not None"):
        talk(spec, meaning)


@pytest.mark.usefixtures("one_trace")
def test_with_when_calls_a_question_stays_whole() -> None:
    made = kvpass.compile(model(), {**NEAR, "name": "mine", "when": "calls"}, 48, inner="eager")
    with torch.no_grad():
        cache = made(torch.arange(1, 151)[None] % 90 + 1, use_cache=True).cache
        before = kvpass.report(cache).to_dict()["bytes"]
        made(torch.arange(1, 21)[None], cache=cache, use_cache=True)
    held = [(layer.positions >= 150).sum(-1) for layer in kvpass.inspect(cache).layers]
    assert all(bool((of == 20).all()) for of in held)
    assert kvpass.report(cache).to_dict()["bytes"] > before


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"extends": "kvpass", "shortest": 0}, "shortest"),
        ({"extends": "h2o", "shortest": 8}, "shortest"),
        ({"extends": "knorm", "shortest": 8}, "shortest"),
        ({"extends": "cake", "shortest": 8}, "shortest"),
        ({"extends": "r_kv", "shortest": 8, "when": "calls"}, "when"),
    ],
)
def test_what_it_cannot_mean(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError, match=f"bad value in {field}"):
        kvpass.Policy.load({"name": "mine", **spec})
