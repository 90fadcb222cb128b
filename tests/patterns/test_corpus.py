"""The corpus: what looks like attention with a cache and must not be rewritten, each with its reason."""

from __future__ import annotations

import sys
import types
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from models.attention import lenient

import kvpass
from kvpass.sites.table import SiteTable

FOLDER = Path(__file__).parent / "corpus"
package = types.ModuleType("corpus")
package.__path__ = [str(FOLDER)]
sys.modules["corpus"] = package
for file in sorted(FOLDER.glob("*.py")):
    import_module(f"corpus.{file.stem}")

from corpus.case import CASES, CONVERSATIONS, MATCHED, UNTOUCHED, Conversation  # noqa: E402

REFUSED = [name for name, case in CASES.items() if case.outcome != MATCHED]


@cache
def ran(name: str) -> tuple[list[SiteTable], Any]:
    """What kvpass saw in a case, and what came out under strict=False."""
    case = CASES[name]
    backend = kvpass.backend("h2o", 0.5, inner="eager", strict=False)
    compiled = torch.compile(case.make(), backend=backend)
    try:
        with torch.no_grad():
            result = compiled(*case.inputs())
    except kvpass.KVPassError as error:
        result = error
    return [record.table for record in backend.graphs], result


@pytest.mark.parametrize("name", CASES)
def test_outcome(name: str) -> None:
    expected, tables = CASES[name].outcome, ran(name)[0]
    sites = [site.name for found in tables for site in found]
    reasons = {str(decline.reason) for found in tables for decline in found.declined}
    assert bool(sites) == (expected == MATCHED)
    assert reasons == {*expected.split()} - {MATCHED, UNTOUCHED}


@pytest.mark.parametrize("name", REFUSED)
def test_never_silently_wrong(name: str) -> None:
    with torch.no_grad():
        expected = CASES[name].make()(*CASES[name].inputs())
    torch.testing.assert_close(ran(name)[1], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equal_or_loud(name: str) -> None:
    """Over several calls, with room for every token: the model's own numbers, or an error that says what to do."""
    talk = CONVERSATIONS[name]
    with torch.no_grad():
        expected = talk.run(talk.make())
        found = answers(talk)
    if isinstance(found, kvpass.KVPassError):
        assert found.hint
        assert not talk.quiet
    elif talk.nan:
        assert all(bool(value.isnan().all()) for value in found)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def answers(talk: Conversation) -> list[Any] | kvpass.KVPassError:
    try:
        return talk.run(lenient(talk.make(), budget=0.5))
    except kvpass.KVPassError as error:
        return error


def test_the_corpus_is_large() -> None:
    assert len(REFUSED) >= 40
