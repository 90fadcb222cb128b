"""What `kvpass.report` says of spans that a caller names, beside loops over what `kvpass.inspect` finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from spelling import cache_of

import kvpass
from kvpass.errors import CacheError

T = 80


@pytest.fixture(scope="module")
def cache() -> Any:
    """Two rows, the second with 20 columns of padding; heads with budgets of their own."""
    torch.manual_seed(0)
    model = kvpass.compile(tiny.llama(), "ada_snapkv", 36, inner="eager")
    ids, mask = tiny.left_padded([T, T - 20])
    with torch.no_grad():
        return cache_of(model(input_ids=ids, attention_mask=mask, use_cache=True))


def kept_and_gone(cache: Any, row: int, start: int, stop: int) -> tuple[float, int]:
    kept = heads = 0
    anywhere: set[int] = set()
    for layer in kvpass.inspect(cache).layers:
        for head in layer.positions[row].tolist():
            mine = {p for p in head if start <= p < stop}
            kept, heads, anywhere = kept + len(mine), heads + 1, anywhere | mine
    return kept / (heads * (stop - start)), stop - start - len(anywhere)


def test_shares_are_counted(cache: Any) -> None:
    spans = {"one": (25, 30), "end": range(T - 10, T), "own": [(0, 20), (20, 60)], "first": [(3, 4), None]}
    rows = kvpass.report(cache, spans).to_dict()["spans"]
    assert [(r["span"], r["row"], r["start"], r["stop"]) for r in rows] == [
        ("one", 0, 25, 30), ("one", 1, 25, 30), ("end", 0, 70, 80), ("end", 1, 70, 80), ("own", 0, 0, 20),
        ("own", 1, 20, 60), ("first", 0, 3, 4),
    ]  # fmt: skip
    for r in rows:
        assert r["heads"] == 4
        assert (r["kept"], r["gone"]) == pytest.approx(kept_and_gone(cache, r["row"], r["start"], r["stop"]))
        assert r["lost"] == (r["gone"] == r["tokens"] == r["stop"] - r["start"])
    assert rows[2]["kept"] == 1.0  # the observation window is protected
    assert any(0 < r["kept"] < 1 for r in rows)


def test_the_alarm() -> None:
    """Of a text of which only the first and the newest tokens stay, what stands between is gone in all heads."""
    model = kvpass.compile(tiny.llama(), "streaming_llm", 20, inner="eager")
    with torch.no_grad():
        cache = cache_of(model(input_ids=tiny.tokens(1, T), use_cache=True))
    report = kvpass.report(cache, {"code": (30, 35), "edge": (2, 6), "end": (T - 4, T)})
    code, edge, end = report.to_dict()["spans"]
    assert (code["lost"], code["gone"], code["kept"]) == (True, 5, 0.0)
    assert (edge["lost"], edge["gone"], edge["kept"]) == (False, 2, 0.5)
    assert (end["lost"], end["gone"], end["kept"]) == (False, 0, 1.0)
    lines = [line.strip() for line in str(report).splitlines() if line.startswith("  span")]
    assert lines == [
        "span code: 5 tokens at 30..34, 0.0% kept over 4 heads; GONE IN ALL HEADS",
        "span edge: 4 tokens at 2..5, 50.0% kept over 4 heads; 2 gone in all heads",
        "span end: 4 tokens at 76..79, 100.0% kept over 4 heads; none gone in all heads",
    ]


def test_without_spans_nothing_is_said(cache: Any) -> None:
    report = kvpass.report(cache)
    assert report.to_dict()["spans"] == []
    assert "span" not in str(report)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ((10, 10), "is 10..10, but the row's tokens stand at 0..80"),
        ((70, 81), "is 70..81"),
        ((-2, 4), "is -2..4"),
        ([(0, 4), (10, 30)], "of row 1 is 10..30, but the row's tokens stand at 20..80"),
        ((10, 20), "of row 1 is 10..20"),
        ([(0, 4)], "of a cache of 2 rows"),
        ((1, 2, 3), "is .1, 2, 3."),
        (range(30, 40, 2), "is range"),
        (7, "is 7, of a cache of 2 rows"),
        ("no", "'no'"),
        ([(30, "b"), None], "is .30, 'b'."),
    ],
)
def test_spans_that_are_none(cache: Any, span: Any, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        kvpass.report(cache, {"s": span})
