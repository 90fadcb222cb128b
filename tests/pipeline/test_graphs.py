"""`print(model.kvpass.graphs)`: a row for each graph, with what was found in it and what it cost."""

from __future__ import annotations

import pytest
import torch
from models.tiny import llama, tokens

import kvpass


def cells(text: str) -> list[dict[str, str]]:
    """Rows by heading: columns are two or more spaces apart."""
    heading, *rows = (line.split("  ") for line in text.splitlines())
    names, *body = ([cell.strip() for cell in row if cell.strip()] for row in (heading, *rows))
    return [dict(zip(names, row, strict=True)) for row in body]


def test_a_row_for_each_graph_of_generate() -> None:
    model = kvpass.compile(llama(), "snapkv", 0.25, inner="eager")
    assert str(model.kvpass.graphs) == "no graph yet: a model is compiled when it is called"
    model.generate(tokens(1, 100), max_new_tokens=4, do_sample=False)
    graphs = model.kvpass.graphs
    rows = cells(str(graphs))
    assert repr(graphs) == str(graphs)
    assert [row["graph"] for row in rows] == ["1", "2"]
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    assert {(row["matched"], row["declined"], row["by choice"]) for row in rows} == {("2", "0", "0")}
    assert [row["ops"] for row in rows] == ["8", "2"]  # of two layers: four at a prefill, one at a step
    assert [int(row["frame"]) for row in rows] == [record.frame for record in graphs]
    for row, record in zip(rows, graphs, strict=True):
        for stage, seconds in record.seconds.items():
            assert float(row[f"{stage}, s"]) == pytest.approx(seconds, abs=0.0051)
    # Dynamo's own time is what the frame took without the backend, so it is there and the sum is `timings`
    captured = sum(float(row["capture, s"]) for row in rows)
    assert captured > 0
    assert captured == pytest.approx(model.kvpass.timings["capture"], abs=0.0051 * len(rows))
    assert max(map(len, str(graphs).splitlines())) <= 120


def test_what_was_not_rewritten_has_its_row() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Windowed(torch.nn.Module):
        """A cache that keeps its last 8 tokens: dense by choice."""

        def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            k, v = torch.cat([k, x], 2), torch.cat([v, x], 2)
            out = torch.nn.functional.scaled_dot_product_attention(x, k, v)
            return out, k[:, :, -8:], v[:, :, -8:]

    class Unlike(torch.nn.Module):
        """Attention that no pattern knows."""

        def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            k, v = torch.cat([k, x], 2), torch.cat([v, x], 2)
            return torch.softmax(torch.sin(x @ k.mT), -1) @ v, k, v

    backend = kvpass.backend("h2o", 0.5, inner="eager", strict=False)
    x, past = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        torch.compile(Plain(), backend=backend)(x)
        torch.compile(Windowed(), backend=backend)(x, past, past)
        torch.compile(Unlike(), backend=backend)(x, past, past)
    rows = cells(str(backend.graphs))
    assert [row["phase"] for row in rows] == ["untouched", "declined", "declined"]
    assert [(row["declined"], row["by choice"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0")]
    assert {row["ops"] for row in rows} == {"0"}
    assert {row["plan, s"] for row in rows} == {"-"}
