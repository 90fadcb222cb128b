"""`kvpass eval` and the harness' own tasks, whole runs without a network: what is counted is what the compressed cache
says. RULER's generators are lm-evaluation-harness' own; six of its tasks need no data but what they make up.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from models.tiny import llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import kvpass
from kvpass.api.cli import main
from kvpass.api.harness import register

pytestmark = pytest.mark.wide  # lm-eval has many dependencies, which CI does without

TASKS = Path(__file__).resolve().parents[2] / "examples" / "eval"
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
TOKENS = 1024
POLICY, BUDGET = "snapkv", 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with SmolLM2's tokenizer: RULER's prompts need real words to be short."""
    where = tmp_path_factory.mktemp("model")
    real = smollm2.cache_folder()
    if not (real / "config.json").exists():
        smollm2.convert(smollm2.gguf_path(), real)
    tokenizer, config = AutoTokenizer.from_pretrained(real, local_files_only=True), llama(layers=1).config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def ruler(folder: Path) -> dict[str, Any]:
    """One prompt of each task; the harness makes 500, which is most of the time that this takes."""
    register()
    import lm_eval
    from lm_eval.tasks import TaskManager

    args = {"pretrained": str(folder), "dtype": "float32", "max_length": 4096}
    found: Any = lm_eval.simple_evaluate(
        model="kvpass",
        model_args={**args, "policy": POLICY, "budget": BUDGET},
        tasks=[*RULER],
        limit=1,
        device="cpu",
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(metadata={**args, "max_seq_lengths": [TOKENS]}),
    )
    return dict(found)


def test_rulers_own_tasks_are_answered_by_the_compressed_cache(folder: Path, ruler: dict[str, Any]) -> None:
    """Answers are those of the compiled model's generate, which are not the full cache's; scores are RULER's: the share
    of the outputs that an answer has in it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    compiled = kvpass.compile(bare, POLICY, BUDGET, inner="eager")
    differ = 0
    for task in RULER:
        (sample,) = ruler["samples"][task]
        ((prompt, settings),) = sample["arguments"]
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert TOKENS / 4 < ids.shape[1] <= TOKENS  # the words that are listed come in tens
        new, options = settings["max_gen_toks"], {"do_sample": False, "pad_token_id": 0}
        few, full = (model.generate(ids, max_new_tokens=new, **options)[0] for model in (compiled, bare))
        ((text,),) = sample["resps"]
        assert text == tokenizer.decode(few[ids.shape[1] :], skip_special_tokens=True)
        differ += few.tolist() != full.tolist()
        outputs = sample["doc"]["outputs"]
        score = sum(one.lower() in text.lower() for one in outputs) / len(outputs)
        assert ruler["results"][task][f"{TOKENS},none"] == score
        assert sample["doc"]["max_length"] == TOKENS
    assert differ > len(RULER) / 2


def test_the_command_on_local_tasks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/eval.md says: a generation and a choice from YAML files, a table and a file of results."""
    monkeypatch.setattr("sys.argv", ["kvpass"])
    args = f"pretrained={folder},policy={POLICY},budget={BUDGET},dtype=float32,max_length=4096"
    command = ["eval", "--model_args", args, "--include_path", str(TASKS), "--tasks", "vault,vault_choice"]
    command += ["--limit", "3", "--device", "cpu", "--output_path", str(tmp_path), "--log_samples"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\|vault_choice *\|.*\|acc *\|", shown)
    assert re.search(r"\|vault *\|.*\|exact_match *\|", shown)
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "kvpass"
    (samples,) = tmp_path.rglob("samples_vault_choice_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3
    right = 0
    for row in rows:
        scores = [float(resp[0][0]) for resp in row["resps"]]
        assert len(scores) == 4
        assert all(math.isfinite(score) and score < 0 for score in scores)
        right += scores.index(max(scores)) == row["target"] or str(scores.index(max(scores))) == str(row["target"])
    assert results["results"]["vault_choice"]["acc,none"] == pytest.approx(right / 3)
