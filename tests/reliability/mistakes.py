"""Calls that fail: the caller's mistakes, and errors from inside. The cache is untouched, or says that it is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability.broken import ERRORS, broken_off
from reliability.plain import Call
from reliability.policies import VOCABULARY, compiled
from reliability.talk import Talk
from transformers import DynamicCache

import kvpass
from kvpass.api.holdings import stores
from kvpass.errors import CacheError, KVPassError, StaleCacheError


def _another_policy(talk: Talk, words: list[Call]) -> None:
    talk.said(words, compiled("h2o" if talk.desk.policy == "tova" else "tova"))


WRONG: dict[str, Callable[[Talk, list[Call]], Any]] = {
    "a row too many": lambda talk, words: talk.said([*words, words[0]]),
    "no such word": lambda talk, words: talk.said([(VOCABULARY + 7,)] * talk.rows),
    "another policy": _another_policy,
    "no such row": lambda talk, words: talk.cache.select([talk.rows]),
    "crop of more than there is": lambda talk, words: talk.cache.crop(talk.plain.width),
    "crop of what is settled": lambda talk, words: talk.cache.crop(talk.plain.loose + 1),
    "merge with an empty one": lambda talk, words: kvpass.Cache.merge(
        [talk.cache, DynamicCache(config=talk.desk.compiled.config)]
    ),
}
"""Each is given a word for every row."""
LOSES = "crop of what is settled"


def may(what: str, talk: Talk) -> bool:
    """Whether a wrong call is wrong under this policy: where nothing goes, any token can be taken back."""
    return what != LOSES or (not talk.desk.spec.keeps_all and not talk.desk.spec.evicted.to)


def mistaken(what: str, talk: Talk, words: list[Call]) -> None:
    before = talk.snapshot()
    with pytest.raises((KVPassError, RuntimeError, ValueError, IndexError)):
        WRONG[what](talk, words)
    check_untouched(talk, before)


def broken(kind: str, after: int, talk: Talk, words: list[Call], depth: int) -> bool:
    """A call that fails after so many functions of the kernels; tentative if there is a depth. Whether it did."""
    before, length, heard = talk.snapshot(), talk.cache.tokens, None
    with kvpass.tentative(depth) if depth else nullcontext(), broken_off(kind, after) as fault:
        try:
            heard = talk.said(words)
        except (ERRORS[kind][0], KVPassError):
            if not fault.happened:
                raise
    came = talk.cache.tokens - length
    if depth:  # one by one: those before the one that failed are there
        said = [[None] * talk.rows] * came if heard is None else list(heard.unbind(1))
        talk.drafted(words, said, depth)
    elif heard is not None:
        talk.plain = talk.plain.told(words, list(heard[:, -1]))
    if fault.happened:
        assert heard is None, "an error was swallowed"
        check_untouched(talk, None if came else before)
    return fault.happened


def check_untouched(talk: Talk, before: list[torch.Tensor] | None) -> None:
    """As it was, if that is known; or refused by everybody."""
    spoiled = [store.spoiled for store in stores(talk.cache.host)]
    if any(spoiled):
        assert all(spoiled)
        return
    if before is not None:
        same = [torch.equal(a, b) for a, b in zip(before, talk.snapshot(), strict=True)]
        assert all(same), "an error changed the cache"


def check_refused(talk: Talk, words: list[Call], folder: Path) -> bool:
    """Whether a cache was left halfway; then nothing goes on from it."""
    if not any(store.spoiled for store in stores(talk.cache.host)):
        return False
    for use in (lambda: talk.said(words), lambda: talk.cache.save(folder / "halfway"), lambda: talk.cache.select([0])):
        with pytest.raises((StaleCacheError, CacheError)):
            use()
    return True
