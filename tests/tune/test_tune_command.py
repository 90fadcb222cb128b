"""`kvpass tune` on a tiny model: its file, its words, going on, and wrong use."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models.saved import saved, text

import kvpass
from kvpass.api.cli import main
from kvpass.tune.candidates import candidate
from kvpass.tune.judge import Judge
from kvpass.tune.loading import load
from kvpass.tune.windows import windows_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(text(1100))
    return command(model, tmp_path)


def command(model: Path, folder: Path) -> list[str]:
    files = ["--text", str(folder / "text.txt"), "--out", str(folder / "best.yaml")]
    return ["tune", str(model), *files, "--budget", "0.5", "--context", "156", "--policies", "snapkv"]


@dataclass(frozen=True)
class Search:
    """One that has run."""

    folder: Path
    command: list[str]
    out: str
    err: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads((self.folder / "best.json").read_text())["rows"]
        return found


@pytest.fixture(scope="module")
def search(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Search:
    folder = tmp_path_factory.mktemp("search")
    (folder / "text.txt").write_text(text(1100))
    given = [*command(model, folder), "--without", "settings"]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main(given) == 0
    return Search(folder, given, out.getvalue(), err.getvalue())


def test_a_search_says_what_it_judged_by_and_what_it_found(search: Search):
    assert "3 windows to choose by, 2 held out" in search.out
    assert "loss: text alone" in search.out  # a random model copies nothing from its full cache either
    assert "On the held-out text:" in search.out
    assert "snapkv: loss" in search.err
    assert {row["name"] for row in search.rows.values()} == {"kvpass", "snapkv"}
    assert all(len(row["held_out"]) == 2 for row in search.rows.values() if row["name"] == "kvpass")
    best = min((row for row in search.rows.values() if row["held_out"]), key=lambda row: mean(row["held_out"], "text"))
    written = yaml.safe_load((search.folder / "best.yaml").read_text())
    assert written == {"name": "best", "extends": best["name"], "budget": 0.5}


def mean(marks: list[dict[str, float]], key: str) -> float:
    return sum(mark[key] for mark in marks) / len(marks)


def test_its_file_is_a_policy_that_evicts(search: Search, model: Path):
    bare, _ = load(str(model), "cpu", "auto")
    compiled = kvpass.compile(bare, policy=str(search.folder / "best.yaml"), inner="eager")
    with torch.no_grad():
        report = kvpass.report(compiled(input_ids=torch.arange(3, 83)[None].repeat(1, 3), use_cache=True)).to_dict()
    assert report["policy"] == "best"
    assert 0.5 <= report["slot_bytes"] / report["dense_bytes"] < 0.52


def test_the_picture_is_one(search: Search):
    pytest.importorskip("matplotlib")
    assert (search.folder / "best.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_measures_nothing_again_and_needs_no_matplotlib(
    search: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = search.rows
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(search.command) == 0
    assert search.rows == rows
    said = capsys.readouterr()
    assert "On the held-out text:" in said.out
    assert "no picture: matplotlib is not installed" in said.err
    assert (search.folder / "best.yaml").exists()


def test_marks_are_those_of_plain_loops(model: Path):
    """At a budget of everything nothing is lost; the full cache's own figures against the model in one call."""
    bare, tokenizer = load(str(model), "cpu", "auto")
    window = windows_of(tokenizer(text(1100)).input_ids, 156).search[0]
    judge = Judge(bare, lambda m, p: kvpass.compile(m, p, inner="eager"), lambda c: kvpass.report(c).to_dict(), 16)
    expected = judge.full(window)
    with torch.no_grad():
        whole = bare(torch.tensor([[*window.prompt, *window.next]])).logits[0, 156:].double().log_softmax(-1)
    torch.testing.assert_close(
        expected.next.logp[:, :-1].double(), whole.gather(-1, expected.next.tokens), atol=1e-4, rtol=0
    )
    (full,) = judge.trial(candidate("all", {"extends": "h2o"}, 0.999), iter([window]), stepwise=True)
    (half,) = judge.trial(candidate("half", {"extends": "h2o"}, 0.5), iter([window]), stepwise=True)
    assert full.text < 1e-3
    assert half.text > 100 * full.text
    assert half.copy > 100 * full.copy
    assert half.held == pytest.approx(0.5, abs=0.1)
    assert half.steps is not None
    assert half.steps > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["/no/such/model"], "no model folder '/no/such/model'"),
        (["--text", "/no/such/text"], "cannot read the text"),
        (["--budget", "1.0"], "keeps everything"),
        (["--budget", "0.0"], "budget"),
        (["--budget", "156"], "a budget of 156 slots holds all of a prompt of 156 tokens"),
        (["--policies", "h3o"], "h3o"),
        (["--without", "code"], "unknown word 'code'"),
        (["--out", "best.txt"], "cannot write a policy to 'best.txt'"),
        (["--device", "nowhere"], "cannot load"),
        (["--dtype", "float7"], "cannot load"),
    ],
)
def test_wrong_use_is_said_before_anything_is_measured(
    asked: list[str], change: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    given = [asked[0], *change, *asked[2:]] if not change[0].startswith("--") else [*asked, *change]
    assert main(given) == 1
    heard = capsys.readouterr()
    assert said in heard.err
    assert "what to do:" in heard.err
    assert not heard.out


def test_a_short_text_says_how_long_it_should_be(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text(text(500))
    assert main(asked) == 1
    assert "the text has 500 tokens, too few" in capsys.readouterr().err
