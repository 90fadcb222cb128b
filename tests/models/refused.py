"""What is wrong with a policy is said before anything is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvpass
from kvpass.errors import PolicyError


def untouchable(*args: Any) -> Any:
    raise AssertionError("compiled before the policy was checked")


def refused(policy: Any, budget: Any, what: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvpass.compile` raises one line of `what`, and `fix` as its hint."""
    monkeypatch.setattr("kvpass.pipeline.compose.Backend.__call__", untouchable)
    with pytest.raises(PolicyError) as caught:
        kvpass.compile(torch.nn.Linear(2, 2).eval(), policy, budget)
    assert what in caught.value.what
    assert fix in caught.value.hint
    assert len(caught.value.what.splitlines()) == 1
