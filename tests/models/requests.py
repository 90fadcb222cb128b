"""What `generate` may be asked, as cases: how a page words what happens, and what shows that it is so.

"works": the unmodified model's tokens at full budget, and a budget of 20 slots is held. "refused: `Error`": by that
error, with a hint. "transformers' own error": the compiled model's is the unmodified one's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.turns import GREEDY
from spelling import cache_of

import kvpass
from kvpass import errors

TESTS = Path(__file__).resolve().parents[1]
BUDGET = 20
SMALL = {"name": "mine", "extends": "h2o", "min_slots": 8}, BUDGET
IDS = tiny.tokens(2, 80)

Asked = dict[str, Any] | Callable[[Any], dict[str, Any]]
"""Arguments of `generate`; those that belong to a model (a cache) are made for it."""


@dataclass(frozen=True)
class Models:
    """A model, and compiled at full budget and at a quarter of the prompt."""

    model: Any
    full: Any
    small: Any

    @staticmethod
    def of(model: Any) -> Models:
        return Models(model, kvpass.compile(model, "full", inner="eager"), kvpass.compile(model, *SMALL, inner="eager"))


@dataclass(frozen=True)
class Case:
    """How the page words what happens, and what shows that it is so."""

    happens: str
    check: Callable[[Models], None]


def generated(model: Any, asked: Asked) -> Any:
    given = asked(model) if callable(asked) else asked
    ids = given.get("inputs", IDS)
    mask = None if ids is None else torch.ones_like(ids)
    settings = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    torch.manual_seed(3)
    return model.generate(**{**settings, **given})


def live(out: Any) -> int:
    return max(int(site["live_max"]) for site in kvpass.report(cache_of(out)).to_dict()["sites"])


def works(*many: Asked, of: Callable[[], Any] | None = None) -> Case:
    """`of`: of another model than the page's."""

    def check(models: Models) -> None:
        models = Models.of(of()) if of else models
        for asked in many or ({},):
            want, full, small = (generated(one, asked) for one in (models.model, models.full, models.small))
            assert torch.equal(full.sequences, want.sequences), asked
            assert live(small) == BUDGET, asked
            assert type(cache_of(small)) is type(cache_of(want))

    return Case("works", check)


def refused(match: str, *many: Asked, error: type[errors.KVPassError] = errors.CacheError, also: bool = True) -> Case:
    """Before any work. `also`: at full budget too."""

    def check(models: Models) -> None:
        for asked in many:
            for model in (models.small, models.full)[: 2 if also else 1]:
                given = asked(model) if callable(asked) else asked
                graphs = len(model.kvpass.graphs)
                with pytest.raises(error, match=match) as caught:
                    generated(model, given)
                assert caught.value.hint
                assert len(model.kvpass.graphs) == graphs

    return Case(f"refused: `{error.__name__}`", check)


def declined(match: str, *many: Asked, of: Callable[[], Any] | None = None) -> Case:
    """By the first call, which shows it."""

    def check(models: Models) -> None:
        models = Models.of(of()) if of else models
        for asked in many or ({},):
            with pytest.raises(errors.DeclinedError, match=match):
                generated(models.small, asked)

    return Case("refused: `DeclinedError`", check)


def as_theirs(*many: Asked, of: Callable[[], Any] | None = None) -> Case:
    """Dynamo may have made another of it, which is one of its kind."""

    def check(models: Models) -> None:
        models = Models.of(of()) if of else models
        for asked in many or ({},):
            with pytest.raises(Exception) as theirs:  # noqa: PT011  # which one is compared
                generated(models.model, asked)
            for model in (models.full, models.small):
                with pytest.raises(type(theirs.value)):
                    generated(model, asked)

    return Case("transformers' own error", check)


def shown(happens: str, *tests: str) -> Case:
    """By other tests, which must exist: `path::test`."""

    def check(models: Models) -> None:
        for test in tests:
            path, name = test.split("::")
            tree = ast.parse((TESTS / path).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test

    return Case(happens, check)
