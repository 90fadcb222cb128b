"""examples/quality/pairs.py on a tiny random model: what stands beside kvpress, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny
from quality import pairs, pairs_page, versus
from quality.measure import Lab
from quality.pairing import BEST, OWN, PAIRS, refused, theirs
from quality.prompts import Prompts
from quality.store import Cell, Settings
from quality.tasks.needles import TASKS

from kvpass.policy.load import names
from kvpass.policy.policy import Policy

CONTEXT = 700


class Letters:
    """A tokenizer of a model that is no assistant: one token for each character, no chat template."""

    chat_template, bos_token = None, "\x02"

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) % 96 + 1 for letter in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 1) for i in ids)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(tiny.llama(layers=1), Letters(), Settings(trials=2))


def row(policy: str, nlls: list[float], budget: float = 0.2) -> dict[str, Any]:
    answers = [{task: {"right": nll < 1, "digits": 5, "nll": nll} for task in TASKS} for nll in nlls]
    trials = [{"answers": one, "held": budget, "end": budget, "text": 1.0} for one in answers]
    return {"policy": policy, "budget": budget, "context": CONTEXT, "commit": "abc", "trials": trials}


def test_without_a_chat_template_a_prompt_begins_with_the_first_token() -> None:
    prompts = Prompts(Letters(), 0)
    assert prompts.head == prompts.encode("\x02")
    assert prompts.tail == prompts.encode("\n")
    assert prompts.prompt(prompts.trial(CONTEXT, 0), CONTEXT, "agnostic", None)[0] == prompts.head[0]


@pytest.mark.parametrize("kind", PAIRS)
def test_names_in_pairs_mean_policies(kind: str) -> None:
    """What evicts a prompt alone leaves the steps alone; what decodes evicts in every step."""
    for name in (one for one in PAIRS[kind] if one not in OWN or one in names()):
        policy = Policy.load(versus.spec_of(name)).with_budget(0.2)
        assert policy.when in (("always",) if name in ("snapkv", "keydiff", "h2o") else ("first", "calls", "always"))
    assert BEST not in theirs(kind)
    assert all(name.startswith(versus.PEER) for name in theirs(kind))


def test_kvpress_has_no_replay_for_gemma() -> None:
    assert refused("gemma", versus.PEER + "kvzip")
    assert not refused("gemma", versus.PEER + "snapkv")
    assert not refused("smollm2", versus.PEER + "kvzip")


def test_text_that_comes_token_by_token(lab: Lab) -> None:
    """The full cache loses nothing against one plain call; an evicting one holds what it may at every look."""
    full, few = (pairs.stepwise(lab, Cell(*one, CONTEXT), [0, 1]) for one in (("full", 1.0), ("streaming_llm", 0.2)))
    for index, one in enumerate(full):
        ids = torch.tensor([lab.prompts.prompt(lab.prompts.trial(CONTEXT, index), CONTEXT, "agnostic", None)])
        with torch.no_grad():
            logits = lab.model(ids).logits[0, -pairs.STEPS - 1 : -1]
        plain = torch.nn.functional.cross_entropy(logits.float(), ids[0, -pairs.STEPS :])
        assert one["text"] == pytest.approx(float(plain), abs=1e-4)
        assert few[index]["end"] == pytest.approx(0.2, abs=0.01)
        assert few[index]["held"] <= few[index]["end"]
        assert abs(few[index]["text"] - one["text"]) > 1e-4


def test_what_an_interval_says() -> None:
    assert pairs_page.compared([1.0, 2.0, 3.0], [2.0, 3.1, 4.0])[2:] == ["-1.033 ± 0.143", "3/3", "kvpass better"]
    assert pairs_page.compared([2.0, 3.1, 4.0], [1.0, 2.0, 3.0])[4] == "kvpass worse"
    assert pairs_page.compared([1.0, 2.0, 3.0], [2.0, 1.0, 3.0])[3:] == ["1/3", "not told apart"]
    assert pairs_page.compared([1.0, 2.0], [1.0, 2.0])[4] == "the same"


def test_the_best_press_is_one_of_one_pass() -> None:
    cells = [
        row("reach", [0.5, 0.7]),
        *(row(f"kvpress {one}", [at, at]) for one, at in (("kvzip", 0.1), ("knorm", 2.0))),
    ]
    cells += [row("kvpress snapkv", [1.0, 1.2]), row("kvpress keydiff", [0.1, 0.1], budget=0.1)]
    ((ours, beside),) = pairs_page.pairs("smollm2", "prompt", cells)
    assert (ours["policy"], beside["policy"]) == ("reach", "kvpress snapkv")
    ((_, beside),) = pairs_page.pairs("gemma", "prompt", [row("retold", [0.5, 0.7]), *cells[2:]])
    assert beside["policy"] == "kvpress snapkv"


def test_the_page_and_kvpress_metrics(tmp_path: Path) -> None:
    cells = [row("full", [0.1, 0.2], 1.0), row("retold", [0.5, 1.5]), row("kvpress kvzip", [0.6, 1.6])]
    steps = [row("full", [0.1, 0.2], 1.0), row("snapkv", [0.5, 0.6]), row("kvpress snapkv", [0.5, 0.6])]
    found = {"model": "smollm2", "title": "Tiny", "command": "pairs.py", "date": "2026-01-01", "seed": 3}
    found |= {"machine": {"cpu": "one"}, "prompt": cells, "steps": steps}
    (tmp_path / "smollm2-2026-01-01-one.json").write_text(json.dumps(found))
    page = pairs_page.write(tmp_path, tmp_path).read_text()
    assert "| `retold` | `kvzip` | 20 % | 20.0 | 20.0 | 3/6 | 3/6 |" in page
    assert "kvpass better |" in page
    assert "Tiny, token by token" in page
    pairs_page.metrics(found, tmp_path / "runs")
    path = tmp_path / "runs" / f"needles__{CONTEXT}__smollm2__kvpass_retold__0.80" / "metrics.json"
    assert json.loads(path.read_text()) == {task: {"string_match": 50.0} for task in TASKS}
    assert len(list(path.parent.parent.iterdir())) == 2
