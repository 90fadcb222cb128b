"""The public names, and nothing by accident."""

from __future__ import annotations

import importlib.metadata

import pytest

import kvpass

PUBLIC = [
    "Cache", "KVPassError", "Policy", "Reason", "Seen", "__version__", "backend", "compile", "explain", "export_mlir",
    "inspect", "instructed", "marked", "page", "replay", "report", "rewrite", "scorer", "tentative",
]  # fmt: skip


def test_all_is_what_users_were_promised():
    assert kvpass.__all__ == PUBLIC
    assert dir(kvpass) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(kvpass, name)
    assert isinstance(value, str) or value.__doc__


def test_star_import_gives_the_public_names():
    names: dict[str, object] = {}
    exec("from kvpass import *", names)
    assert set(PUBLIC) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="compil_"):
        kvpass.compil_  # noqa: B018


def test_version_is_the_installed_one():
    assert importlib.metadata.version("kvpass") == kvpass.__version__


def test_every_error_is_a_kvpass_error_and_every_reason_has_a_hint():
    from kvpass import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    raised = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(raised) > 5
    assert all(issubclass(error, kvpass.KVPassError) for error in raised)
    assert all(reason.hint and reason.value == reason.name for reason in kvpass.Reason)
