"""Two processes equal one: a model on two ranks, through transformers' tp_plan, against the same model in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ranks

RANKS = 2
WORKER = Path(__file__).parents[1] / "support" / "on_ranks.py"


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said and kept, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.made().save_pretrained(folder / "model")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*run, str(WORKER), str(folder)], env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_processes_equal_one(case, on_ranks, one_trace):
    alone, parts = ranks.said(ranks.compiled(_model(), case)), [one[case] for one in on_ranks]
    for part in parts:
        assert torch.equal(part["tokens"], alone["tokens"])
    for layer, kept in enumerate(alone["kept"]):
        assert torch.equal(_side_by_side([part["kept"][layer] for part in parts]), kept)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """The positions of all ranks' heads: [B, Hkv, C], -1 behind those of heads that hold fewer."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2]), value=-1) for part in parts], 1)


_KNOWN: list[Any] = []


def _model() -> Any:
    """The same object for all cases, which share its traces."""
    if not _KNOWN:
        _KNOWN.append(ranks.made())
    return _KNOWN[0]
