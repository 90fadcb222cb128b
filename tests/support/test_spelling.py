"""The cache has the name that the model at hand gives it, and an old name does not pass in silence."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import spelling
import torch
from models import tiny
from spelling import cache_of, declared, given_cache, with_cache
from torch import nn
from transformers import DynamicCache

NEW = spelling.INSTALLED == "cache"


class New(nn.Module):
    def forward(self, x: Any, cache: Any = None) -> Any: ...


class Old(nn.Module):
    def forward(self, x: Any, past_key_values: Any = None) -> Any: ...


class Neither(nn.Module):
    def forward(self, x: Any) -> Any: ...


class HandsOn(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


def test_the_name_is_the_model_s() -> None:
    assert [declared(kind()) for kind in (New, Old, Neither, HandsOn)] == ["cache", "past_key_values", None, None]
    cache = object()
    assert with_cache(New(), cache) == {"cache": cache}
    assert with_cache(Old(), cache) == {"past_key_values": cache}
    assert with_cache(HandsOn(), cache) == {spelling.INSTALLED: cache}


def test_the_cache_of_a_call_and_of_its_output() -> None:
    cache = object()
    for name in spelling.NAMES:
        assert given_cache({"input_ids": 1, name: cache}) is cache
        assert cache_of(SimpleNamespace(**{name: cache})) is cache
    assert given_cache({"input_ids": 1}) is None
    assert cache_of(SimpleNamespace(logits=1)) is None


def test_a_model_of_the_installed_transformers_takes_it() -> None:
    model, cache = tiny.llama(), DynamicCache()
    with torch.no_grad():
        out = model(tiny.tokens(1, 5), **with_cache(model, cache))
    assert cache_of(out) is cache
    assert cache.get_seq_length() == 5


@pytest.mark.skipif(not NEW, reason="transformers before 5.24 has only the old name")
def test_old_names_are_noticed() -> None:
    model, ids = tiny.llama(), tiny.tokens(1, 5)
    with torch.no_grad(), pytest.raises(FutureWarning, match="past_key_values"):
        model(ids, past_key_values=DynamicCache())
    (handler,) = (h for h in logging.getLogger("transformers").handlers if type(h).__name__ == "Deprecations")
    handler.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "`past_key_values` is deprecated"}))
    assert handler.said == ["`past_key_values` is deprecated"]
    handler.said.clear()  # or this test's own fixture fails
