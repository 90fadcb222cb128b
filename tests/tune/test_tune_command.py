"""`kvpass tune` on a tiny model: its file, its words, going on, and wrong use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    files = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "best.yaml")]
    return ["tune", str(model), *files, "--budget", "0.5", "--context", "160", "--policies", "snapkv"]


def test_a_search_writes_a_policy_a_picture_and_its_record_and_goes_on(
    asked: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    alone = [*asked, "--without", "settings"]
    assert main(alone) == 0
    said = capsys.readouterr()
    assert "windows to choose by, 2 held out" in said.out
    assert "loss: text alone" in said.out  # a random model copies nothing
    assert "On the held-out text:" in said.out
    assert "snapkv: loss" in said.err
    assert (tmp_path / "best.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "best.json").read_text())
    assert {row["name"] for row in record["rows"].values()} == {"h2o", "snapkv"}
    assert all(row["held_out"] or len(row["search"]) < 3 for row in record["rows"].values())
    written = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert written["extends"] in ("h2o", "snapkv")
    assert written["budget"] == 0.5
    bare, _ = load(str(model), "cpu", "auto")
    out = kvpass.compile(bare, policy=str(tmp_path / "best.yaml"), inner="eager")(
        torch.arange(3, 91)[None].repeat(1, 3)
    )
    assert kvpass.report(out.cache).to_dict()["bytes"] < kvpass.report(out.cache).to_dict()["dense_bytes"]

    rows = record["rows"]
    assert main(alone) == 0  # nothing is measured again
    assert json.loads((tmp_path / "best.json").read_text())["rows"] == rows
    assert capsys.readouterr().out.count("windows to choose by") == 1


def test_marks_are_those_of_plain_loops(model: Path):
    """At a budget of everything nothing is lost; the full cache's own figures against the model in one call."""
    bare, tokenizer = load(str(model), "cpu", "auto")
    window = windows_of(tokenizer(text(1100)).input_ids, 160).search[0]
    judge = Judge(bare, lambda m, p: kvpass.compile(m, p, inner="eager"), lambda c: kvpass.report(c).to_dict(), 16)
    expected = judge.full(window)
    with torch.no_grad():
        whole = bare(torch.tensor([[*window.prompt, *window.next]])).logits[0, 160:].double().log_softmax(-1)
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
        (["--budget", "160"], "a budget of 160 slots holds all of a prompt of 156 tokens"),
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


def test_without_matplotlib_there_is_a_table_and_a_word(model: Path, asked: list[str], tmp_path: Path):
    block = (
        "import sys; sys.modules['matplotlib'] = None; from kvpass.api.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    given = [sys.executable, "-P", "-c", block, *asked, "--without", "settings"]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "On the held-out text:" in done.stdout
    assert "no picture: matplotlib is not installed" in done.stderr
    assert (tmp_path / "best.yaml").exists()
