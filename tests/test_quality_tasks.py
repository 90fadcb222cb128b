"""examples/quality/tasks on a tiny random model, letters as tokens: texts, judges and tables, not the figures."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from models import tiny
from models.letters import Letters
from quality import answers, judge, run, tasks_page
from quality.measure import Lab
from quality.prompts import MODES, Prompts
from quality.store import Cell, Settings, Store
from quality.tasks import DEFAULT, KINDS, TASKS, kinds_of, named
from quality.tasks.trial import Kind, Question
from rich.console import Console
from transformers import AutoTokenizer, DynamicCache

CONTEXT = 900
SHORT = ("hard-needle", "keep-secret", "many-steps")


def tokenizer(kind: str) -> Any:
    if kind == "letters":
        return Letters()
    if not (smollm2.cache_folder() / "config.json").exists():
        smollm2.convert(smollm2.gguf_path(), smollm2.cache_folder())
    return AutoTokenizer.from_pretrained(smollm2.cache_folder(), local_files_only=True)


TOKENIZERS = ["letters", pytest.param("smollm2", marks=pytest.mark.model)]


@pytest.fixture(scope="module", params=TOKENIZERS)
def prompts(request: pytest.FixtureRequest) -> Prompts:
    return Prompts(tokenizer(request.param), 0)


FIRST = {
    ("letters", 0, 700): "0929c9e974140d6d6165e0c871b071d4604ab5d7d846325f61f2b9befebbad9b",
    ("letters", 1, 900): "9d13a043f3b804901a47b06cd8a56749e7b5d6d9b98f1a0cad2eaef0cdd2c873",
    ("smollm2", 1, 1024): "45ff7bdcec4d36c308e7b22a41cb7ce529eb160e0409ac219572abfb35b86980",
}
"""By tokenizer, seed and context, all that was said to the model before there were other tasks than the first three."""


@pytest.mark.parametrize("told", [pytest.param(k, marks=[pytest.mark.model] * (k[0] != "letters")) for k in FIRST])
def test_the_first_three_tasks_are_what_they_were(told: tuple[str, int, int]) -> None:
    """So that finished cells stay comparable."""
    kind, seed, context = told
    made, said = Prompts(tokenizer(kind), seed), []
    for index in range(2):
        trial = made.trial(context, index)
        for mode in MODES:
            for task in DEFAULT:
                gold = trial.questions[task].gold
                said.append([made.prompt(trial, context, mode, task), made.follow_up(trial, mode, task), gold])
    assert hashlib.sha256(json.dumps(said).encode()).hexdigest() == FIRST[told]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_texts_are_exact_and_trials_share_a_batch(prompts: Prompts, kind: Kind) -> None:
    trials = [prompts.trial(CONTEXT, index, kind) for index in range(4)]
    assert trials[0] == prompts.trial(CONTEXT, 0, kind)
    assert trials[0] != trials[1]
    assert {*trials[0].questions} == {*kind.tasks}
    for task in kind.tasks:
        for mode in MODES:
            rows = [prompts.prompt(trial, CONTEXT, mode, task) for trial in trials]
            assert {len(row) for row in rows} == {CONTEXT}
            assert len({len(prompts.follow_up(trial, mode, task)) for trial in trials}) == 1
            for row, trial in zip(rows, trials, strict=True):
                assert all(contains(row, needle) for needle in trial.needles)
                assert contains(row, trial.questions[task].asked) == (mode == "aware")
        asked = [trial.questions[task] for trial in trials]
        assert len({(len(q.gold), len(q.steps), *map(len, q.rivals)) for q in asked}) == 1


def contains(row: list[int], part: list[int]) -> bool:
    return any(row[at : at + len(part)] == part for at in range(len(row) - len(part) + 1))


TOLD = [task for task in TASKS if task not in ("first-rule", "second-rule")]
"""Whose answers are in needles, steps or system prompts as they are to be said."""


@pytest.mark.parametrize("task", TOLD)
def test_the_answer_is_in_what_the_model_is_given(prompts: Prompts, task: str) -> None:
    for index in range(4):
        trial = prompts.trial(CONTEXT, index, TASKS[task])
        question = trial.questions[task]
        row = [*prompts.prompt(trial, CONTEXT, "agnostic", task), *question.steps]
        assert contains(row, question.gold)
        if not question.rivals:
            assert judge._span(row, question.gold) is not None


def test_the_asked_name_is_told_from_the_others(prompts: Prompts) -> None:
    """hard-needle: one needle has both words, and each other one shares exactly one with it."""
    trial = prompts.trial(CONTEXT, 3, TASKS["hard-needle"])
    asked = trial.questions["hard-needle"]
    words = {word: prompts.encode(f" {word}") for word in prompts.words}
    name = {word for word, tokens in words.items() if contains(asked.asked, tokens)}
    told = [name & {word for word, tokens in words.items() if contains(needle, tokens)} for needle in trial.needles]
    assert sorted(map(len, told)) == [1, 1, 2]
    assert [contains(needle, asked.gold) for needle in trial.needles] == [own == name for own in told]


def test_names_of_tasks() -> None:
    assert named("all") == tuple(TASKS)
    assert named("copy, passkey") == ("passkey", "copy")
    assert named(",".join(DEFAULT)) == DEFAULT
    assert [kind.name for kind in kinds_of(("copy", "variable"))] == ["needles", "copy"]
    for wrong in ("copies", ""):
        with pytest.raises(ValueError, match="no task"):
            named(wrong)
    assert run.arguments(["--check"]).tasks == tuple(TASKS)
    assert run.arguments(["--check"]).policies == ["full"]
    with pytest.raises(SystemExit):
        run.arguments(["--tasks", "copies"])


@torch.no_grad()
def test_the_judge_against_whole_sequences() -> None:
    """Every answer in one call of the model for each row and each continuation."""
    model, rng = tiny.llama(layers=1), random.Random(4)
    prompt, lead = [[rng.randrange(1, 90) for _ in range(20)] for _ in range(2)], [[5, 6], [7, 8]]
    rivals = [[[11, 12], [13]], [[14, 15], [16]]]
    asked = [Question([], own, [21, 22, 23], r) for own, r in zip(lead, rivals, strict=True)]
    plain = [replace(one, rivals=()) for one in asked]

    def score(row: list[int], said: list[int]) -> tuple[float, list[int]]:
        logp = model(torch.tensor([row + said])).logits[0, len(row) - 1 : -1].double().log_softmax(-1)
        return -sum(float(logp[at, token]) for at, token in enumerate(said)) / len(said), logp.argmax(-1).tolist()

    found = {}
    for name, questions in (("rivals", asked), ("plain", plain)):
        cache = DynamicCache(config=model.config)
        judge.call(model, torch.tensor(prompt), cache)
        found[name] = judge.judged(model, cache, torch.tensor(lead), questions)
    for at, row in enumerate(p + own for p, own in zip(prompt, lead, strict=True)):
        nll, best = score(row, asked[at].gold)
        others = [score(row, rival)[0] for rival in rivals[at]]
        assert found["rivals"][at]["nll"] == found["plain"][at]["nll"] == pytest.approx(nll, abs=1e-4)
        assert found["rivals"][at]["right"] == (nll < min(others))
        assert found["plain"][at]["right"] == (best == asked[at].gold)
        assert found["plain"][at]["digits"] == sum(a == b for a, b in zip(best, asked[at].gold, strict=True))


def test_greedy_answers_are_right_and_others_not() -> None:
    """What the model itself says next is right; one other token is not."""
    model, cache = tiny.llama(layers=1), DynamicCache(config=tiny.llama(layers=1).config)
    with torch.no_grad():
        first = judge.call(model, torch.tensor([[3, 4, 5]]), copy.deepcopy(cache)).argmax(-1)
        said = [int(first)]
        said.append(int(judge.call(model, torch.tensor([[3, 4, 5, *said]]), copy.deepcopy(cache)).argmax(-1)))
        for gold, right in ((said, True), ([said[0], said[1] + 1], False)):
            own = DynamicCache(config=model.config)
            (entry,) = judge.judged(model, own, torch.tensor([[3, 4, 5]]), [Question([], [], gold)])
            assert (entry["right"], entry["digits"]) == (right, 2 if right else 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: Any) -> Store:
    """The full cache and chance, asked three tasks; then, of the finished cells, one more."""
    folder = tmp_path_factory.mktemp("tasks")
    model = tiny.llama(layers=1)
    cells = [Cell("full", 1.0, CONTEXT), Cell("streaming_llm", 0.1, CONTEXT)]
    for tasks in (SHORT[:2], SHORT):
        settings = Settings(trials=2, steps=4, tasks=tasks)
        store = Store(settings, folder)
        assert not any(store.done(cell) for cell in cells)
        assert run.run(Lab(model, Letters(), settings), store, cells, Console(quiet=True)) == len(cells)
        assert not store.errors()
        assert all(store.done(cell) for cell in cells)
    return store


def test_tasks_that_are_named_later_are_added(measured: Store) -> None:
    for cell in measured.cells():
        assert [*cell["retrieval"]["aware"]] == [*cell["retrieval"]["agnostic"]] == [*SHORT]
        assert all(len(cell["retrieval"][mode][task]) == 2 for mode in MODES for task in SHORT)
        assert len(cell["text"]["kl"]) == 2


def test_what_is_gone_is_said(measured: Store) -> None:
    """Of the newest tenth alone, what stands far back is gone in all heads; the full cache loses nothing."""
    full, few = (next(c for c in measured.cells() if c["policy"] == name) for name in ("full", "streaming_llm"))
    for mode in MODES:
        assert all(entry["gone"] == 0 and entry["kept"] == 1 for entry in full["retrieval"][mode]["hard-needle"])
        lost = [entry for entry in few["retrieval"][mode]["hard-needle"] if entry["kept"] == 0]
        assert lost
        assert all(entry["gone"] == 5 for entry in lost)
    assert answers.gone(full, "agnostic", ["hard-needle"]) == "0"
    assert float(answers.gone(few, "agnostic", ["hard-needle"])) > 0


def entries(*right: bool) -> list[dict[str, Any]]:
    return [{"right": one, "digits": 1, "nll": 1.0 + one, "gone": 2 * one, "kept": 0.5} for one in right]


def cell(policy: str, **tasks: list[dict[str, Any]]) -> dict[str, Any]:
    held = {"bytes": 20, "dense_bytes": 100}
    return {"policy": policy, "context": 10, "held": held, "retrieval": {mode: {**tasks} for mode in MODES}}


def test_what_the_full_cache_fails_counts_for_nothing() -> None:
    full = cell("full", passkey=entries(True, True), copy=entries(False, False, True))
    other = cell("h2o", passkey=entries(True, False), copy=entries(True, True, True))
    third = cell("random", passkey=entries(True, True))
    assert answers.counted([full, other], "aware") == ["passkey"]
    assert answers.counted([other], "aware") == ["passkey", "copy"]
    assert answers.counted([other, third], "aware") == ["passkey"]
    lines = answers.tables([full, other, third])
    (row,) = [line.split(" | ") for line in lines if "`h2o`" in line]
    header = next(line for line in lines if line.startswith("| policy")).strip("| ").split(" | ")
    said = dict(zip(header, [part.strip("| ") for part in row], strict=True))
    assert said["passkey aware"] == said["passkey agnostic"] == "1/2 [9-91]"
    assert said["copy aware"].startswith("3/3")
    assert (said["all aware %"], said["gone agnostic %"]) == ("50", "80")
    assert said["answer NLL"].startswith("1.50")
    assert "fails: copy aware (33 % right), copy agnostic (33 % right)" in lines[-1]


def test_many_tasks_have_a_table_for_each_mode() -> None:
    tasks = {task: entries(True) for task in [*TASKS][:5]}
    lines = answers.tables([cell("full", **tasks)])
    headers = [line for line in lines if line.startswith("| policy")]
    assert [("answer NLL" in one, one.count("|")) for one in headers] == [(False, 10), (True, 11)]


def test_the_page_of_tasks(measured: Store, tmp_path: Path) -> None:
    page = tasks_page.write([c for c in measured.cells() if c["policy"] == "full"], "make quality", tmp_path)
    rows = [line for line in page.read_text().splitlines() if line.startswith(tuple(f"| {task} " for task in TASKS))]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [*SHORT]
    for row, task in zip(rows, SHORT, strict=True):
        assert TASKS[task].tasks[task] in row
