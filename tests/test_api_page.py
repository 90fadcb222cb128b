"""docs/api.md is what `make api` makes, has every public name, and says a word of each argument, field and method."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import kvpass

SCRIPT = Path(__file__).resolve().parent / "support" / "api_page.py"
spec = importlib.util.spec_from_file_location("api_page", SCRIPT)
assert spec is not None
assert spec.loader is not None
api_page = importlib.util.module_from_spec(spec)
sys.modules["api_page"] = api_page
spec.loader.exec_module(api_page)

PAGE = api_page.PAGE.read_text()


def test_the_page_is_up_to_date() -> None:
    assert api_page.page() == PAGE, "run make api"


def test_every_public_name_error_and_reason_is_there() -> None:
    from kvpass import errors

    for name in set(kvpass.__all__) - api_page.ELSEWHERE:
        assert f"\n### kvpass.{name}\n" in PAGE
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, kvpass.KVPassError):
            assert f" {name} " in PAGE, "draw it in the tree of kvpass/errors.py"
    for reason in kvpass.Reason:
        assert f"\n| `{reason.value}` | " in PAGE


def test_nothing_is_left_undocumented() -> None:
    assert api_page.undocumented() == []


def test_what_is_not_documented_is_found(monkeypatch) -> None:
    def told(cache: int, depth: int = 3) -> int:
        """Says something.

        Args:
            cache: a cache.
        """
        return cache + depth

    monkeypatch.setattr(kvpass, "told", told, raising=False)
    monkeypatch.setattr(api_page, "SECTIONS", {"Test": [("kvpass", "told")]})
    assert api_page.undocumented() == ["kvpass.told: depth"]
    assert "| `cache` | a cache. |" in api_page.entry("kvpass", "told")
