"""Graphs that look like attention with a cache and are not: what becomes of each, and that nothing changes in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.attention import WIDTH, Layer, attend, hidden, layer, lenient, past
from models.graphs import capture, outcome
from models.plain import rotary
from torch import nn

import kvpass


def encoder(self, x):
    return self.finish(attend(*self.project(x)))


def encoder_with_rope(self, x):
    """The cats of RoPE feed the attention."""
    q, k, v = self.project(x)
    return self.finish(attend(rotary(q, 0), rotary(k, 0), v))


def rope_table_returned(self, x):
    angle = torch.outer(torch.arange(x.shape[1]), 100.0 ** (-torch.arange(4) / 4))
    table = torch.cat([angle, angle], -1)[None]
    return self.finish(attend(*self.project(x))), table.cos(), torch.cat([table, table], -1)


def class_token(self, x):
    """A weight in front of the sequence; all of it asks and is asked."""
    x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
    return self.finish(attend(*self.project(x))), x


def memory_tokens(self, x, memory):
    """An input in front of the sequence, returned: the sequence itself, not keys of it."""
    x = torch.cat([memory, x], 1)
    return self.finish(attend(*self.project(x))), x


def prefix_keys(self, x):
    """Learned keys, as in prefix tuning."""
    q, k, v = self.project(x)
    k, v = torch.cat([self.prefix.expand(2, -1, -1, -1), k], 2), torch.cat([self.prefix.expand(2, -1, -1, -1), v], 2)
    return self.finish(attend(q, k, v))


def cross_attention(self, x, memory):
    return self.finish(attend(*self.project(x, memory)))


def given_keys(self, x, keys):
    """Keys and values that somebody made before, only read."""
    return self.finish(attend(self.project(x)[0], *keys))


def given_keys_returned(self, x, keys):
    return self.finish(attend(self.project(x)[0], *keys)), keys


def skip_connection(self, x, other):
    """U-Net: channels of an input and of a feature side by side, returned."""
    return torch.cat([other, self.finish(attend(*self.project(x)))], -1)


def dense_block(self, x, image):
    """DenseNet: 4-d, along axis 1, returned, followed by a softmax over something else."""
    grown = torch.cat([image, image.relu() * 2], 1)
    return grown, grown.mean((2, 3)).softmax(-1)


def two_inputs(self, x, other):
    return torch.cat([x, other], 1)


def two_inputs_then_classes(self, x, other):
    both = torch.cat([other, x], 1)
    return both, self.q(both).softmax(-1)


def features_of_two(self, x, other):
    """A feature pyramid: levels of an input and of the layer, then an encoder over both."""
    both = torch.cat([other, self.finish(attend(*self.project(x)))], 1)
    return both, self.finish(attend(*self.project(both)))


def history(self, x, previous):
    """A recurrent model keeps its inputs."""
    kept = torch.cat([previous, x], 1)
    return self.q(kept).mean(1), kept


def convolution_state(self, x, state):
    """Mamba's: the last columns of a cat are the next state."""
    wide = torch.cat([state, x.transpose(1, 2)], 2)
    return F.conv1d(wide, torch.ones(WIDTH, 1, 3), groups=WIDTH), wide[:, :, -2:]


def queries_cached(self, x, old):
    """Attention whose queries grow: keys and values are this call's own."""
    q, k, v = self.project(x)
    q = torch.cat([old, q], 2)
    return self.finish(attend(q, k, v)), q


def only_lengths(self, x, cache):
    q, k, v = self.project(x)
    return self.finish(attend(q, k, v)) * cache[0].shape[2]


def attention_pooling(self, x):
    weights = self.q(x).softmax(1)
    return (weights * x).sum(1), torch.cat([x, x], 1)


def make(forward: Any) -> nn.Module:
    parts = {"token": nn.Parameter(torch.randn(1, 1, WIDTH)), "prefix": nn.Parameter(torch.randn(1, 2, 3, 8))}
    return layer(forward, **parts)


CASES: dict[Any, tuple[tuple[Any, ...], str]] = {
    encoder: ((hidden(6),), "untouched"),
    encoder_with_rope: ((hidden(6),), "untouched"),
    rope_table_returned: ((hidden(6),), "untouched"),
    class_token: ((hidden(6),), "untouched"),
    memory_tokens: ((hidden(6), hidden(2)), "untouched"),
    prefix_keys: ((hidden(6),), "untouched"),
    cross_attention: ((hidden(6), hidden(6)), "untouched"),
    given_keys: ((hidden(1), past()), "untouched"),
    given_keys_returned: ((hidden(1), past()), "untouched"),
    skip_connection: ((hidden(6), hidden(6)), "untouched"),
    dense_block: ((hidden(6), torch.randn(2, 3, 4, 5)), "untouched"),
    two_inputs: ((hidden(6), hidden(6)), "untouched"),
    two_inputs_then_classes: ((hidden(6), hidden(6)), "untouched"),
    features_of_two: ((hidden(6), hidden(6)), "untouched"),
    history: ((hidden(1), hidden(6)), "untouched"),
    convolution_state: ((hidden(1), torch.randn(2, WIDTH, 2)), "untouched"),
    queries_cached: ((hidden(4), torch.randn(2, 4, 3, 8)), "untouched"),
    only_lengths: ((hidden(4), past()), "untouched"),
    attention_pooling: ((hidden(4),), "untouched"),
}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_outcome(forward):
    args, expected = CASES[forward]
    assert outcome(make(forward), *args) == expected


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_nothing_changes(forward):
    args, _ = CASES[forward]
    model = make(forward)
    with torch.no_grad():
        torch.testing.assert_close(lenient(model)(*args), model(*args), rtol=0, atol=0)


@pytest.mark.parametrize("forward", [encoder, skip_connection, history], ids=lambda f: f.__name__)
def test_the_same_graph_reaches_the_inner_compiler(forward, monkeypatch):
    args, _ = CASES[forward]
    given: list[Any] = []
    monkeypatch.setattr(
        "kvpass.pipeline.compose.compile_inner", lambda inner, gm, inputs, real: given.append(gm) or gm.forward
    )
    gm = capture(make(forward), *args)
    nodes = list(gm.graph.nodes)
    kvpass.backend("h2o", 8)(gm, [])
    assert given == [gm]
    assert list(gm.graph.nodes) == nodes


def test_keys_and_values_that_are_returned_count_as_a_cache():
    """By design: nothing in one graph tells features from a cache, if both keys and values come back."""

    def forward(self, x):
        q, k, v = self.project(x)
        return self.finish(attend(q, k, v)), k, v

    assert outcome(layer(forward), hidden(6)) == "prefill"


def test_no_cache_wanted():
    class Model(Layer):
        def forward(self, x, use_cache):
            q, k, v = self.project(x)
            return self.finish(attend(q, k, v)), (k, v) if use_cache else None

    torch.manual_seed(0)
    assert outcome(Model().eval(), hidden(6), False) == "untouched"
    assert outcome(Model().eval(), hidden(6), True) == "prefill"
