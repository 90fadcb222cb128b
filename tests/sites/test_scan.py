"""Joining cores and updates into a site table."""

from __future__ import annotations

import pytest
import torch
from kvpass.patterns import DEFAULT
from models import golden, plain
from models.attention import attend, hidden, layer, past
from models.graphs import capture, dynamic, table

from kvpass.sites.scan import scan
from kvpass.sites.table import SiteTable


@pytest.mark.parametrize("kind", [plain.Decoder, plain.GroupedDecoder])
@pytest.mark.parametrize(("length", "phase"), [(1, "decode"), (3, "extend")])
def test_decoders(kind, length, phase):
    cache = tuple((torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)) for _ in range(2))
    found = table(plain.make(kind), plain.tokens(2, length), cache)
    assert [(s.name, s.layer, s.phase, s.key.layout.value, s.group) for s in found] == [
        ("blocks.0", 0, phase, "BHTD", 2),
        ("blocks.1", 1, phase, "BHTD", 2),
    ]
    assert not found.declined
    assert all("plain.py" in s.source and "scaled_dot_product_attention" in s.source for s in found)
    assert [s.core.mask is not None for s in found] == [kind is plain.Decoder] * 2


def test_module_attributes():
    model = plain.make(plain.AttributeDecoder)
    first = table(model, plain.tokens(1, 20))
    assert [(s.phase, s.key.layout.value, s.key.update.form) for s in first] == [
        ("prefill", "BTHD", "new returned as the cache")
    ] * 2
    second = table(model, plain.tokens(1, 1))
    assert [(s.phase, s.key.update.form) for s in second] == [("decode", "cat(past, new)")] * 2


def test_a_model_without_a_cache():
    assert table(plain.make(plain.Uncached), plain.tokens(2, 20)) == SiteTable()
    assert not SiteTable()


def test_scanning_changes_nothing():
    gm = capture(plain.make(plain.Decoder), plain.tokens(2, 20), None)
    before = [golden.line(n) for n in gm.graph.nodes]
    tables = [str(scan(gm, DEFAULT)) for _ in range(2)]
    assert tables[0] == tables[1]
    assert [golden.line(n) for n in gm.graph.nodes] == before


def test_dynamic_lengths():
    cache = tuple((dynamic(torch.randn(2, 2, 9, 8), 0, 2), dynamic(torch.randn(2, 2, 9, 8), 0, 2)) for _ in range(2))
    found = table(plain.make(plain.Decoder), dynamic(plain.tokens(2, 3), 0, 1), cache)
    assert [s.phase for s in found] == ["extend", "extend"]
    assert isinstance(found.sites[0].dims["S"], torch.SymInt)


def test_matched_and_declined_side_by_side():
    """Two layers in one module: one good, one whose keys escape. The good one is numbered as if it were alone."""

    def forward(self, x, one, two):
        q, k, v = self.project(x)
        k1, v1 = torch.cat([one[0], k], 2), torch.cat([one[1], v], 2)
        bad = attend(q, k1, v1)
        k2, v2 = torch.cat([two[0], k], 2), torch.cat([two[1], v], 2)
        return bad + k1.mean(), attend(q, k2, v2), (k1, v1), (k2, v2)

    found = table(layer(forward), hidden(), past(), past())
    assert [(s.layer, s.key.update.node.name) for s in found] == [(0, "k2")]
    assert [(d.reason, d.node) for d in found.declined] == [("KEY_ESCAPES", "mean")]
    text = str(found)
    assert text.startswith("1 site(s) matched, 1 declined")
    assert "hint: only the attention and the returned cache may read the cached keys" in text


def test_a_table_is_plain_data():
    found = table(plain.make(plain.Decoder), plain.tokens(2, 20), None).to_dict()
    assert found["declined"] == []
    row = found["sites"][0]
    assert (row["site"], row["phase"], row["layout"], row["dtype"]) == ("blocks.0", "prefill", "BHTD", "float32")
    assert row["core"].startswith("sdpa: ")


def test_a_cross_attention_beside_a_self_attention():
    """A decoder layer of an encoder-decoder: its own cache is rewritten, the other sequence's is not."""

    def forward(self, x, memory, cache):
        q, k, v = self.project(x)
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = self.finish(attend(q, k, v))
        q, cross_k, cross_v = self.project(y, memory)
        return self.finish(attend(q, cross_k, cross_v)), (k, v), (cross_k, cross_v)

    for length in (1, 4):
        found = table(layer(forward), hidden(length), hidden(4), past())
        assert [s.phase for s in found] == ["decode" if length == 1 else "extend"]
        assert [d.reason for d in found.declined] == ["CROSS_ATTENTION"]
