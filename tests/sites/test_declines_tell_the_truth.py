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


def stacked_transposed(self, x):
    """As in pytorch-transformers' GPT-2, with its product of logits and mask."""
    q, k, v = self.project(x)
    k, v = k.repeat_interleave(2, 1).mT, v.repeat_interleave(2, 1)
    shown = torch.ones(6, 6).tril()
    y = torch.softmax(q @ k * shown - 1e10 * (1 - shown), -1) @ v
    return self.finish(y), torch.stack((k.mT, v))


def stacked_twice(self, x):
    q, k, v = self.project(x)
    return self.finish(attend(q, k, v, is_causal=True)), torch.stack([torch.stack((k, v))])


def stacked_and_turned_later(self, x):
    q, k, v = self.project(x)
    return self.finish(attend(q, k * x.new_ones(8).cos(), v, is_causal=True)), torch.stack((k, v))


def beside_a_ring(self, x, keys, values):
    """As in mistral's reference: the prompt attends to its own keys."""
    q, k, v = self.project(x)
    k = torch.view_as_real(torch.view_as_complex(k.reshape(2, 2, 6, 4, 2)) * 1j).flatten(3).type_as(k)
    at = (torch.arange(6) % 8)[None, None, :, None].repeat(2, 2, 1, 8)
    keys[:2].scatter_(2, at, k[:, :, -8:])
    values[:2].scatter_(2, at, v[:, :, -8:])
    return self.finish(attend(q, k, v, is_causal=True))


PROMPTS = {
    stacked_transposed: ("UNSUPPORTED_ATTENTION", "q @ k * shown", ()),
    stacked_twice: ("UNSUPPORTED_UPDATE", "torch.stack([torch.stack((k, v))])", ()),
    stacked_and_turned_later: ("KEY_ESCAPES", "k * x.new_ones(8).cos()", ()),
    beside_a_ring: ("UNSUPPORTED_UPDATE", "keys[:2].scatter_", (torch.zeros(3, 2, 8, 8), torch.zeros(3, 2, 8, 8))),
}


@pytest.mark.parametrize("forward", PROMPTS)
def test_a_cache_in_another_form_is_named_in_the_prompt(forward):
    reason, line, buffers = PROMPTS[forward]
    (graph,) = capture_all(layer(forward), hidden(6), *buffers)
    (said,) = scan(graph, DEFAULT).declined
    assert said.reason == reason
    assert line in said.source


def test_what_is_returned_beside_is_no_cache():
    """Of an attention that no pattern knows: what it gives, its logits, its weights, sums over its keys."""

    def forward(self, x):
        q, k, v = self.project(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        logits = torch.sin(q @ k.mT)
        weights = torch.softmax(logits, -1)
        y = weights @ v
        return self.finish(y), x + self.finish(y), y, logits, weights, k.mean(2, keepdim=True), torch.stack((x, x * 2))

    (graph,) = capture_all(layer(forward), hidden(6))
    assert not scan(graph, DEFAULT).declined


def test_hidden_states_are_no_cache():
    """They are returned and projected to keys and values, but to queries too."""
    model = llama(layers=3)
    for options in ({"output_hidden_states": True}, {"output_hidden_states": True, "use_cache": False}):
        with torch.no_grad():
            found = [scan(gm, DEFAULT) for gm in capture_all(model, tokens(2, 9), **options)]
        assert not any(one.declined for one in found), found
        assert sum(len(one.sites) for one in found) == (0 if "use_cache" in options else 3)
