"""lm-evaluation-harness' model `kvpass`, against plain calls of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.saved import saved

import kvpass
from kvpass.api.harness import register

pytestmark = pytest.mark.wide  # lm-eval has many dependencies, which CI does without


@pytest.fixture
def made() -> Any:
    """The registered class; says how to install lm-eval, if it is not there."""
    return register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def asked(tokens: torch.Tensor) -> list[Any]:
    """Two continuations of one context, one of a short one."""
    rows = tokens.tolist()
    return [(None, rows[:200], rows[200:206]), (None, rows[:1], rows[1:4]), (None, rows[:200], rows[210:211])]


def whole(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The whole in one call of the unmodified model, token by token."""
    with torch.no_grad():
        logp = model(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    rows = [logp[len(context) - 1 + i] for i in range(len(continuation))]
    score = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
    return score, all(int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True))


@pytest.mark.usefixtures("made")
def test_split_scores_are_the_models_own_with_all_slots_and_read_the_compressed_cache_with_few(folder: Path):
    from lm_eval.api.registry import get_model

    lm = get_model("kvpass")(pretrained=str(folder), policy="full", device="cpu", dtype="float32")
    few = get_model("kvpass")(pretrained=str(folder), policy="snapkv", budget=70, device="cpu", dtype="float32")
    tokens = torch.randint(3, 93, (300,), generator=torch.Generator().manual_seed(3))
    requests = asked(tokens)
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, evicted = lm._loglikelihood_tokens(requests), few._loglikelihood_tokens(requests)
    for (_, context, continuation), (score, greedy), (other, _) in zip(requests, found, evicted, strict=True):
        expected, best = whole(bare, context, continuation)
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == best
        assert (abs(other - expected) > 1e-2) == (len(context) > 70)

    ids = tokens[None, :200]
    compiled = kvpass.compile(bare, "snapkv", 70, inner="eager")
    expected_text = compiled.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert few._model_generate(ids, max_length=205, stop=[]).tolist() == expected_text.tolist()


def test_whole_texts_are_refused_by_name(folder: Path, made: Any):
    lm = made(pretrained=str(folder), policy="snapkv", budget=70, device="cpu", dtype="float32")
    with pytest.raises(kvpass.KVPassError, match="reads no compressed cache"):
        lm.loglikelihood_rolling([])
