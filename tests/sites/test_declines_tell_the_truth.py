"""What a decline says is so: it points at the line that blocks, and the layer is matched once its hint is followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kvpass.patterns import DEFAULT
from models.attention import attend, hidden, layer, lenient
from models.graphs import capture_all
from models.tiny import llama, tokens

import kvpass
from kvpass.errors import DeclinedError, Reason
from kvpass.sites.scan import scan

sys.path.insert(0, str(Path(__file__).resolve().parent))

from telling import CASES, PARTS

ELSEWHERE = {
    "INDEXER": "nothing to do (tests/patterns/test_indexer.py)",
    "SLIDING_WINDOW": "nothing to do",
    "CROSS_ATTENTION": "nothing to do",
}
"""Reasons without a change to follow here."""


def made(name: str, right: bool):
    case = CASES[name]
    model = layer(_bound(case.forward, right), **PARTS)
    return model.double() if case.reason == "DTYPE" and not right else model.float()


def _bound(forward, right):
    def call(self, *args):
        return forward(self, right, *args)

    return call


def tables(name: str, right: bool):
    torch.manual_seed(2)
    return [scan(gm, DEFAULT) for gm in capture_all(made(name, right), *CASES[name].args(right))]


@pytest.mark.parametrize("name", CASES)
def test_the_reason_and_its_line(name):
    case = CASES[name]
    found = tables(name, right=False)
    declined = [decline for one in found for decline in one.declined]
    assert not any(one.sites for one in found)
    assert case.reason in {str(decline.reason) for decline in declined}, declined
    said = next(decline for decline in declined if decline.reason == case.reason)
    assert case.line in said.source
    assert "telling.py" in said.source
    assert case.hint in said.hint


@pytest.mark.parametrize("name", CASES)
def test_the_hint_helps(name):
    found = tables(name, right=True)
    assert not [decline for one in found for decline in one.declined]
    assert [len(one.sites) for one in found] == [1]


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_put_to_the_test(reason):
    assert (str(reason) in {case.reason for case in CASES.values()}) != (str(reason) in ELSEWHERE)


def test_what_needs_no_change_runs_under_strict():
    def window(self, x):
        q, k, v = self.project(x)
        return self.finish(attend(q, k, v)), k[:, :, -4:], v[:, :, -4:]

    def cross(self, x, memory):
        q, k, v = self.project(x, memory)
        return self.finish(attend(q, k, v)), k, v

    for forward, args in ((window, (hidden(6),)), (cross, (hidden(6), hidden(9)))):
        compiled = kvpass.compile(layer(forward), "h2o", 8, inner="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), layer(forward)(*args), rtol=0, atol=0)
        (record,) = compiled.kvpass.graphs
        assert record.table.declined
        assert all(decline.hint.startswith("nothing to do") for decline in record.table.declined)


def test_a_prompt_says_what_the_step_would():
    """Under strict=True a latent cache is an error at the first call; under strict=False all stays the model's own."""
    model = made("latents_of_a_prompt", right=False)
    with torch.no_grad(), pytest.raises(DeclinedError, match="PROJECTED_CACHE"):
        kvpass.compile(model, "h2o", 8, inner="eager")(hidden(6))
    x = hidden(6)
    with torch.no_grad():
        torch.testing.assert_close(lenient(model)(x), model(x), rtol=0, atol=0)


def test_hidden_states_are_no_cache():
    """They are returned and projected to keys and values, but to queries too."""
    model = llama(layers=3)
    for options in ({"output_hidden_states": True}, {"output_hidden_states": True, "use_cache": False}):
        with torch.no_grad():
            found = [scan(gm, DEFAULT) for gm in capture_all(model, tokens(2, 9), **options)]
        assert not any(one.declined for one in found), found
        assert sum(len(one.sites) for one in found) == (0 if "use_cache" in options else 3)
