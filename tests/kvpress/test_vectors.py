"""kvpass keeps what NVIDIA's kvpress keeps of the same prompt, or differs as DIFFERENCES says.

vectors.json comes from make_vectors.py (README.md); kvpress is not needed here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kvpass.kernels.rank.scorers import registry
from spelling import with_cache
from transformers import DynamicCache

import kvpass

HERE = Path(__file__).resolve().parent


def _model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvpress_vectors_model", HERE / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _model()
STORED = json.loads((HERE / "vectors.json").read_text())
pytestmark = pytest.mark.usefixtures("one_trace")

WINDOW, TOKENS = STORED["window"], STORED["tokens"]
VECTORS = STORED["vectors"]

Kept = list[list[list[int]]]
"""Positions by layer and KV head."""

DIFFERENCES = {
    "snapkv": "kvpress averages over 5 neighbours and 64 queries; the preset takes the maximum over 7 and 32 queries",
    "tova": "kvpress keeps the newest token whatever its score; the preset, like the repository, does not",
    "observed_attention": "sums divided by the queries that see the key: `mean` in kvpass; H2O itself ranks by sums",
    "finch": "kvpress weighs the row of the query at position p by p, though it sees p + 1 keys; the preset by p + 1",
    "pyramidkv": "kvpress takes T * (1 - ratio) for the mean without the window, then counts the window in it; the "
    "preset (as the repository) puts the window on top. kvpress computes in floats and falls back to equal layers "
    "where the smallest would be below the window",
    "ada_pyramid": "kvpress' AdaKV(PyramidKV) ignores PyramidKV's layer budgets: it is AdaKV(SnapKV)",
    "critical_ada": "kvpress shares a layer's budget out over the heads by attention alone, the preset by the weighted "
    "score",
    "lagkv": "equal ranks of several blocks, and tokens after the last scored block where they alone are more than the "
    "budget: topk's order in kvpress, the older key in kvpass",
    "chunkkv": "kvpress counts in whole chunks and lets chunks lie across the window's start; kvpass keeps the budget "
    "exactly (the last chunk may be cut), and cuts chunks at the window",
    "streaming_llm": "none (keys keep their positions in both)",
    "knorm": "kvpress protects nothing, and keeps what is generated; the preset protects the last 32 tokens",
    "keydiff": "none (kvpress' BlockPress repeats it block by block, kvpass scores once)",
    "q_filters": "none",
    "kvzap": "kvpress' scorer protects nothing (its threshold press the last 128), the preset the last 32 tokens",
    "expected_attention": "none (kvpass finds the unrotated queries in the graph, kvpress projects them again)",
    "cur": "no preset; the scorer below is all it takes",
    "criticalkv": "none, for the same scores below. kvpress does not protect the window in its second stage: where the "
    "window is longer than half of the budget, a window token of tiny value norm could go",
    "ada_snapkv": "none, for the same scores below",
    "random": "other random numbers: not compared",
    "compactor, leverage, kvzip": "no counterpart: other passes over the prompt, or sketches by chance",
}
"""By policy, what is defined otherwise."""

SNAPKV = {
    "name": "x",
    "extends": "snapkv",
    "observe": {"queries": WINDOW},
    "pool": {"kind": "avg", "size": 5},
    "protect": {"recent": WINDOW},
}
CHUNKKV = {"name": "x", "extends": "chunkkv", "observe": {"queries": WINDOW}, "protect": {"recent": WINDOW}}
FINCH = {"name": "x", "extends": "finch", "observe": {"queries": WINDOW}, "protect": {"recent": WINDOW}}


def lag(**options: Any) -> dict[str, Any]:
    return {"name": "x", "extends": "lagkv", "options": options}


EXACT: dict[str, dict[str, Any] | str] = {
    "streaming_llm": "streaming_llm",
    "knorm": {"name": "x", "score": "knorm"},
    "keydiff": "keydiff",
    "q_filters": {"name": "x", "extends": "q_filters", "options": {"file": "weights.pt"}},
    "kvzap": {"name": "x", "extends": "kvzap", "options": {"file": "weights.pt"}, "protect": {"recent": 0}},
    "expected_attention": "expected_attention",
    "cur": {"name": "x", "score": "cur"},
    "tova": {"name": "x", "extends": "tova", "protect": {"recent": 1}},
    "observed_attention": {
        "name": "x",
        "observe": {"queries": "all"},
        "statistic": {"keep": ["sum", "count"]},
        "score": "mean",
    },
    "snapkv": SNAPKV,
    "finch": FINCH | {"score": "finch_as_kvpress"},
    "ada_snapkv": {**SNAPKV, "extends": "ada_snapkv"},
    "ada_knorm": {"name": "x", "score": "knorm", "allocate": {"heads": "flat", "safeguard": 0.97}},
    "criticalkv": {**SNAPKV, "extends": "criticalkv"},
    "lagkv_32": lag(block=32),
    "lagkv_8": lag(block=8),
    "lagkv_cross": lag(block=32, cross=True),
    "lagkv_short": "lagkv",
    "chunkkv_8": {**CHUNKKV, "granule": {"size": 8}},
}
"""kvpress' press as a kvpass policy: the same positions are kept, all of them."""


@pytest.fixture
def own_scorers() -> Iterator[None]:
    """What kvpress computes and kvpass has no name for, as scorers of a user."""

    @kvpass.scorer("finch_as_kvpress", reads=("rows",))
    def finch_as_kvpress(seen: Any) -> torch.Tensor:
        """FINCH, with one visible key too few for each query."""
        rows = torch.where(seen.before_window[:, :, None, None], seen.observed, 0.0)
        keys = (seen.observed > 0).sum(-1, keepdim=True) - 1
        return (rows * keys).mean((2, 3))

    @kvpass.scorer("cur", reads=("keys", "values"))
    def cur(seen: Any, block: int = 16, sinks: int = 4) -> torch.Tensor:
        """CurDKV (arXiv 2509.15038) as kvpress has it: shares of the squared norms of key and value in a block."""
        share = torch.ones_like(seen.pos, dtype=torch.float32)
        for x in (seen.keys, seen.values):
            blocks = x.square().sum(-1).unflatten(-1, (-1, block))
            share = share * (blocks / blocks.sum(-1, keepdim=True)).flatten(-2)
        return share.masked_fill(seen.pos < sinks, 1.0)

    yield
    for name in ("finch_as_kvpress", "cur"):
        registry._TABLE.pop(name)


@lru_cache(maxsize=2)
def model(shape: str) -> Any:
    return tiny.llama(shape)


def kvpass_keeps(vector: dict[str, Any], policy: Any, budget: int) -> Kept:
    """Positions after the vector's prompt."""
    network = model(vector["shape"])
    compiled = kvpass.compile(network, policy=policy, budget=budget, inner="eager")
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        compiled(tiny.prompt(vector["prompt"]), **with_cache(compiled, cache), use_cache=True, logits_to_keep=1)
    layers = [layer.positions[0].tolist() for layer in kvpass.inspect(cache).layers]
    return [[[p for p in head if p >= 0] for head in layer] for layer in layers]


def kvpress_keeps(vector: dict[str, Any]) -> Kept:
    return [[tiny.unpacked(head) for head in layer] for layer in vector["kept"]]


def even(layer: list[list[int]]) -> int:
    """Slots per KV head, on average: the budget as kvpass says it."""
    total = sum(len(head) for head in layer)
    assert total % len(layer) == 0
    return total // len(layer)


def find(name: str) -> dict[str, Any]:
    (found,) = (v for v in VECTORS if v["name"] == name)
    return found


def shared(ours: Kept, theirs: Kept) -> float:
    """Share of kvpress' positions that kvpass keeps too, of the head where it is smallest."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return min(len(set(a) & set(b)) / len(b) for a, b in pairs)


def test_the_model_is_the_same() -> None:
    for shape, stored in STORED["checksums"].items():
        assert tiny.checksum(model(shape)) == pytest.approx(stored, rel=1e-12)


def test_every_vector_is_compared() -> None:
    related = {"pyramidkv", "pyramidkv_beta2", "critical_ada", "chunkkv_10"}
    assert {v["name"] for v in VECTORS} == set(EXACT) | related


@pytest.mark.usefixtures("own_scorers")
@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["name"] in EXACT], ids=lambda v: f"{v['name']}-{v['shape']}-{v['ratio']}"
)
def test_the_same_positions(vector: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = tiny.surrogate(model(vector["shape"]).config.hidden_size)
    torch.save({"filters": tiny.filters(), "weight": weight, "bias": bias}, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    theirs = kvpress_keeps(vector)
    assert kvpass_keeps(vector, EXACT[vector["name"]], even(theirs[0])) == theirs


def test_tova_preset_but_for_the_newest_token() -> None:
    """Without protection of its own, the newest token stays or goes by its score."""
    vector = next(v for v in VECTORS if v["name"] == "tova" and v["shape"] == "mha")
    theirs = kvpress_keeps(vector)
    ours = kvpass_keeps(vector, "tova", even(theirs[0]))
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a, b, strict=True):
            assert TOKENS - 1 in other
            assert set(other) - set(mine) <= {TOKENS - 1}


def test_finch_preset() -> None:
    """p or p + 1 for the weight of a row changes next to nothing."""
    vector = find("finch")
    theirs = kvpress_keeps(vector)
    assert shared(kvpass_keeps(vector, FINCH, even(theirs[0])), theirs) >= 0.97


def test_pyramidkv_has_the_window_on_top() -> None:
    """With T * (1 - ratio) for the mean without the window, kvpass keeps what kvpress keeps and `window` more. (Not so
    with beta 20: the lowest layers' budgets exceed this prompt, and kvpress gives what they cannot fill to the others.)
    """
    vector, beta = find("pyramidkv_beta2"), 2
    theirs = kvpress_keeps(vector)
    policy = {**SNAPKV, "extends": "pyramidkv", "allocate": {"beta": beta}}
    ours = kvpass_keeps(vector, policy, int(TOKENS * (1 - vector["ratio"])) + WINDOW)
    for a, b in zip(ours, theirs, strict=True):
        assert abs(even(a) - even(b) - WINDOW) <= 1  # integer steps, not rounded floats
        for mine, other in zip(a, b, strict=True):
            assert set(other) < set(mine)


def test_pyramidkv_is_snapkv_with_another_budget() -> None:
    vector = find("pyramidkv_beta2")
    theirs = kvpress_keeps(vector)
    assert kvpass_keeps(vector, SNAPKV, even(theirs[0]))[0] == theirs[0]


def test_critical_ada_is_criticalkv_with_each_heads_budget() -> None:
    """With the budget that kvpress gave a head, CriticalKV keeps what kvpress kept there."""
    vector = find("critical_ada")
    theirs = kvpress_keeps(vector)[1][0]
    assert kvpass_keeps(vector, EXACT["criticalkv"], len(theirs))[1][0] == theirs


def test_critical_ada_preset() -> None:
    """The heads of a layer share the same sum otherwise."""
    vector = find("critical_ada")
    theirs = kvpress_keeps(vector)
    ours = kvpass_keeps(vector, {**SNAPKV, "extends": "critical_ada"}, even(theirs[0]))
    assert [sum(map(len, x)) for x in ours] == [sum(map(len, x)) for x in theirs]
    assert ours != theirs
    assert shared(ours, theirs) >= 0.85


def test_chunkkv_with_a_chunk_across_the_windows_start() -> None:
    """Six of the prefix' tokens share a chunk with the window: kvpress keeps them with it, kvpass for their score."""
    vector = find("chunkkv_10")
    theirs = kvpress_keeps(vector)
    ours = kvpass_keeps(vector, {**CHUNKKV, "granule": {"size": 10}}, even(theirs[0]))
    assert all(head[-WINDOW:] == list(range(TOKENS - WINDOW, TOKENS)) for layer in ours + theirs for head in layer)
    assert shared(ours, theirs) >= 0.9
