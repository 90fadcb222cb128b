"""examples/quality on a tiny random model, letters as tokens: the harness, not the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.letters import Letters
from quality import pool, render, run, shown, stats, versus
from quality.measure import Lab, batch_rows
from quality.prompts import MODES
from quality.reference import Reference
from quality.store import Cell, Settings, Store
from quality.tasks.needles import TASKS
from rich.console import Console

from kvpass.policy.policy import Policy

CONTEXT = 700
CELLS = [Cell("full", 1.0, CONTEXT), Cell("random", 0.2, CONTEXT)]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(tiny.llama(layers=1), Letters(), Settings(trials=2, steps=20))


@pytest.fixture(scope="module")
def measured(lab: Lab, tmp_path_factory: Any) -> Store:
    store = Store(lab.settings, tmp_path_factory.mktemp("quality"))
    assert run.run(lab, store, CELLS, Console(quiet=True)) == len(CELLS)
    assert not store.errors()
    return store


def cell(store: Store, policy: str) -> dict[str, Any]:
    return next(found for found in store.cells() if found["policy"] == policy)


def test_prompts_have_their_length_and_needles(lab: Lab) -> None:
    prompts, trial = lab.prompts, lab.prompts.trial(CONTEXT, 0)
    assert trial == lab.prompts.trial(CONTEXT, 0)
    for mode in MODES:
        for task in TASKS:
            ids, question = prompts.prompt(trial, CONTEXT, mode, task), trial.questions[task]
            assert len(ids) == CONTEXT
            assert (ids[-len(question.asked) :] == question.asked) == (mode == "aware")
            text = prompts.tokenizer.decode(ids)
            assert all(prompts.tokenizer.decode(needle) in text for needle in trial.needles)
            assert prompts.tokenizer.decode(question.gold) in text
            assert (prompts.follow_up(trial, mode, task)[: len(question.asked)] == question.asked) == (mode != "aware")


def test_full_is_the_full_cache(measured: Store) -> None:
    text = cell(measured, "full")["text"]
    assert max(text["kl"] + text["kl_greedy"]) < 1e-6
    assert text["agree"] == text["agree_greedy"] == [1.0, 1.0]
    assert text["mass"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_eviction_shows(measured: Store) -> None:
    found = cell(measured, "random")
    assert shown.held(found) == pytest.approx(0.2, abs=0.02)
    assert min(found["text"]["kl"]) > 1e-3
    assert max(found["text"]["mass"]) < 0.6
    assert all(len(found["retrieval"][mode][task]) == 2 for mode in MODES for task in TASKS)


def test_a_second_run_computes_nothing(lab: Lab, measured: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "measure", lambda *_: pytest.fail("measured again"))
    assert run.run(lab, measured, CELLS, Console(quiet=True)) == 0


def test_a_failure_is_noted_and_tried_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, broken = Store(lab.settings, tmp_path), Cell("full", 1.0, CONTEXT)
    monkeypatch.setattr(run, "load_or_measure", lambda *_: None)
    monkeypatch.setattr(pool, "_reference", lambda *_: None)
    monkeypatch.setattr(pool, "measure", lambda *_: 1 / 0)
    assert run.run(lab, store, [broken], Console(quiet=True)) == 0
    assert store.errors() == {f"{CONTEXT}-1-full": "ZeroDivisionError: division by zero"}
    assert not store.done(broken)


def test_cells_side_by_side(lab: Lab, tmp_path: Path) -> None:
    """A worker with a model of its own, and what it says comes back: here that a policy has no weights."""
    store, cells = Store(lab.settings, tmp_path), [Cell("dms", 0.2, CONTEXT)]
    torch.save(dict.fromkeys(Reference.__dataclass_fields__, torch.zeros(1)), store.reference_path(CONTEXT))
    said = {cell.policy: found for cell, found in pool.outcomes(lab, store, cells, 2, lambda doing: None)}
    assert "no weight file" in str(said["dms"])


def test_rendering(measured: Store, tmp_path: Path) -> None:
    found = run.results(measured, "make quality")
    paths = render.write(found, tmp_path, "2026-01-01-cpu", tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md", ".png", ".md"]
    assert all(path.stat().st_size for path in paths)
    page = paths[3].read_text()
    assert "`random`" in page
    assert "2026-01-01-cpu.png" in page
    assert "Not measured" in page
    assert "1,024 tokens, 20 %: all " in page
    before = [path.read_text() for path in (paths[1], paths[3])]
    assert [path.read_text() for path in render.newest({}, tmp_path, tmp_path) if path.suffix == ".md"] == before
    assert json.loads(paths[0].read_text())["cells"] == measured.cells()


def test_rendering_nothing_says_so(lab: Lab, tmp_path: Path) -> None:
    nothing = run.results(Store(lab.settings, tmp_path / "cells"), "make quality")
    (page,) = render.newest(nothing, tmp_path / "results", tmp_path)
    assert "No figures yet" in page.read_text()
    assert "full" in page.read_text().split("## Missing")[1]


def test_intervals() -> None:
    assert stats.wilson(6, 6) == pytest.approx((1.0, 0.6097, 1.0), abs=1e-4)
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert stats.mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.484, 2 + 2.484), abs=1e-3)


def test_batches_have_one_shape() -> None:
    assert [batch_rows(6, n) for n in (1024, 2048, 4096, 9000)] == [6, 3, 2, 1]
    assert [batch_rows(20, 1024), batch_rows(20, 4096)] == [5, 2]


def test_two_libraries_are_compared_pair_by_pair(measured: Store) -> None:
    """The same cell under both names: no difference; what is in one library alone is no pair."""
    mine = cell(measured, "random")
    cells = [{**mine, "policy": name} for name in ("random (first call)", "kvpress random", "kvpress other", "random")]
    ((policy, *both),) = versus.pairs(cells)
    assert policy == "random (first call)"
    assert versus.row(policy, *both)[3::2] == ["+0.000 ± 0.000", "+0.00 ± 0.00", "+0.00 ± 0.00"]
    worse = {**both[0], "text": {**mine["text"], "kl": [value + 0.25 for value in mine["text"]["kl"]]}}
    assert versus.row(policy, worse, both[1])[3] == "+0.250 ± 0.000"


def test_names_of_cells_mean_policies() -> None:
    policies = {name: Policy.load(versus.spec_of(name)).with_budget(0.2) for name in versus.beside_peer()}
    assert {policy.when for policy in policies.values()} == {"first"}
    assert policies["snapkv (as kvpress)"].observe.queries == 64
    assert policies["snapkv (first call)"].observe.queries == 32
