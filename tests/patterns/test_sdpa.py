"""The SDPA core: every way to call it, and what is refused with which reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kvpass.patterns import DEFAULT
from kvpass.patterns.sdpa import SdpaCore
from models.attention import DIM, attend, hidden, layer, past
from models.graphs import capture, capture_all, node, table
from torch import nn

import kvpass
from kvpass.graph.miss import Miss
from kvpass.sites.scan import scan

CALL = "torch._C._nn.scaled_dot_product_attention"


def cached(**options: Any) -> nn.Module:
    def forward(self, x, cache, mask=None):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return self.finish(attend(q, k, v, attn_mask=mask, **options)), (k, v)

    return layer(forward)


def core_of(call: Any, *args: Any) -> Any:
    return SdpaCore().match(node(capture(call, *args), "sdpa"))


@pytest.mark.parametrize(("options", "scale"), [({}, DIM**-0.5), ({"scale": 0.25}, 0.25), ({"scale": 1}, 1.0)])
def test_scale(options, scale):
    assert core_of(cached(**options), hidden(), past()).scale == pytest.approx(scale)


def test_positional_and_keyword_arguments_are_the_same():
    q, k, v = (torch.randn(2, 4, 3, DIM) for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    spellings = [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, 0.0, False),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, attn_mask=mask, is_causal=False),
    ]
    for spelling in spellings:
        core = core_of(spelling, q, k, v)
        assert (core.q.name, core.k.name, core.v.name) == ("l_q_", "l_k_", "l_v_")
        assert core.mask is not None
        assert not core.causal


def test_causal_and_no_mask():
    q, k, v = (torch.randn(2, 4, 3, DIM) for _ in range(3))
    core = core_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    assert core.causal
    assert core.mask is None


def test_nothing_else_is_a_core():
    gm = capture(cached(), hidden(), past())
    assert [n.name for n in gm.graph.nodes if SdpaCore().match(n)] == [node(gm, "sdpa").name]


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (2, 1, 1, 6), (2, 4, 1, 6), (2, 1, 1, 1), (1, 6), (4, 1, 6), (1, 1)])
@pytest.mark.parametrize("additive", [True, False])
def test_masks_of_every_rank(shape, additive):
    mask = torch.zeros(shape) if additive else torch.ones(shape, dtype=torch.bool)
    (site,) = table(cached(), hidden(), past(), mask).sites
    assert site.core.mask is not None


def declined(call: Any, *args: Any) -> Any:
    (found,) = table(call, *args).declined
    assert "models/attention.py" in found.source or "test_sdpa.py" in found.source
    return found


def test_dropout():
    found = declined(cached(dropout_p=0.1), hidden(), past())
    assert (found.reason, found.detail) == ("DROPOUT", "dropout_p=0.1")
    assert found.node == "scaled_dot_product_attention"


def test_dropout_with_keyword_operands_is_reported_too():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.1, enable_gqa=True)
        return self.finish(y), (k, v)

    assert declined(layer(forward), hidden(), past()).reason == "DROPOUT"


def test_dropout_without_a_cache_is_nobodys_business():
    def forward(self, x):
        return self.finish(attend(*self.project(x), dropout_p=0.1))

    assert not table(layer(forward), hidden(4))


def test_three_dimensions():
    def forward(self, x, cache):
        k = torch.cat([cache[0], x], 1)
        v = torch.cat([cache[1], x], 1)
        return F.scaled_dot_product_attention(x, k, v), (k, v)

    (site,) = table(layer(forward), hidden(), (hidden(5), hidden(5))).sites
    assert (site.key.layout.value, site.dims["Hkv"], site.dims["Hq"]) == ("BT[32]", 1, 1)


def test_double():
    cache = tuple(t.double() for t in past())
    found = declined(cached().double(), hidden().double(), cache)
    assert (found.reason, found.detail) == ("DTYPE", "q, k, v are ['torch.float64']")


def test_a_scale_that_changes_from_call_to_call():
    def forward(self, x, cache, scale):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        return attend(q, k, v, scale=scale), (k, v)

    made = layer(forward)
    compiled = torch.compile(made, backend=kvpass.backend("full", inner="eager"))
    with torch.no_grad():
        first = (hidden(20), tuple(t[:, :, :0] for t in past()))
        for scale in (0.3, 0.4, 0.7):  # Dynamo makes it symbolic; kvpass reads it, and Dynamo guards what was read
            torch.testing.assert_close(compiled(*first, scale)[0], made(*first, scale)[0])


def test_is_causal_with_one_query_and_a_past():
    found = declined(cached(is_causal=True), hidden(), past())
    assert (found.reason, found.detail) == ("CAUSAL_WITH_PAST", "is_causal=True with one query")


def test_is_causal_with_several_queries_and_a_past_means_what_it_means_in_torch():
    (site,) = table(cached(is_causal=True), hidden(3), past()).sites
    assert (site.phase, site.core.causal) == ("extend", True)


def test_a_miss_names_its_node():
    with pytest.raises(Miss, match="DROPOUT"):
        core_of(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), torch.randn(1, 1, 2, 8))


def test_attention_split_from_its_cache_by_a_graph_break():
    def forward(self, x, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        torch._dynamo.graph_break()
        return self.finish(attend(q, k, v)), (k, v)

    first, second = capture_all(layer(forward), hidden(), past())
    (found,) = scan(first, DEFAULT).declined
    assert (found.reason, found.detail) == ("NO_ATTENTION", "nothing in this graph attends over it")
    assert "graph break" in found.to_dict()["hint"]
    assert not scan(second, DEFAULT)
