"""What goes wrong in the middle of a call: the model stays usable, the cache is whole or refused, nothing is kept."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from kvpass.kernels.rank.scorers.registry import _TABLE
from models import plain, tiny
from models.turns import GREEDY
from spelling import cache_of, with_cache
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import kvpass
from kvpass.api.holdings import stores
from kvpass.errors import PolicyError, StaleCacheError

E: dict[str, Any] = {"inner": "eager"}
BUDGET = 40
IDS = tiny.tokens(2, 90)


def generated(model: Any, ids: Any = IDS, new: int = 4, **asked: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **GREEDY, **asked)


def check_usable(model: Any, want: Any) -> None:
    out = generated(model)
    assert torch.equal(out.sequences, want.sequences)
    assert all(int(store.live().max()) == BUDGET for store in stores(cache_of(out)))


class Interrupting(StoppingCriteria):
    """Somebody presses Ctrl-C between two steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return torch.zeros(2, dtype=torch.bool)


def test_an_interrupt_between_steps() -> None:
    """The cache is what three steps made of it, and goes on."""
    model = kvpass.compile(tiny.llama(layers=1), "h2o", BUDGET, **E)
    want, longer = generated(model), generated(model, new=7)
    cache = DynamicCache(config=model.config)
    with pytest.raises(KeyboardInterrupt):
        generated(model, new=7, **with_cache(model, cache), stopping_criteria=StoppingCriteriaList([Interrupting(3)]))
    tokens = kvpass.report(cache).to_dict()["tokens"]
    assert tokens == 92
    so_far = longer.sequences[:, : tokens + 1]
    again = generated(model, so_far, new=4, **with_cache(model, cache))
    assert torch.equal(again.sequences, longer.sequences)
    check_usable(model, want)


FAULT: dict[str, Any] = {"left": 0, "error": None}


def faulty(seen: kvpass.Seen) -> torch.Tensor:
    """The norm of a token's value; it fails when it is asked for the `left`-th time from now."""
    FAULT["left"] -= 1
    if not FAULT["left"]:
        raise FAULT["error"]
    return torch.linalg.vector_norm(seen.values, dim=-1)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    kvpass.scorer("faulty", reads=("values",), pointwise=True)(faulty)
    yield
    _TABLE.pop("faulty")


FAULTY = {"name": "faulty", "score": "faulty", "min_slots": 8, "protect": {"sinks": 2, "recent": 8}}
ERRORS: list[type[BaseException]] = [torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_inside_a_call(kind: type[BaseException]) -> None:
    """In the second layer, when the first has its tokens: of a prompt, and of a step."""
    model = kvpass.compile(tiny.one_llama(), FAULTY, BUDGET, **E)
    want = generated(model)
    fail_twice(model, kind)  # traces that tests share keep the cache that they were made with
    kept = fail_twice(model, kind)
    check_usable(model, want)
    gc.collect()
    assert not kept, "nothing holds them any more"


def fail_twice(model: Any, kind: type[BaseException]) -> weakref.WeakSet[Any]:
    """A prompt and a step that fail, and what may go on then; the stores of both caches, which are gone by the end."""
    kept: weakref.WeakSet[Any] = weakref.WeakSet()

    def fails(cache: Any, tokens: torch.Tensor) -> None:
        FAULT.update(left=2, error=kind("a scorer of mine"))
        with pytest.raises(PolicyError if kind is ZeroDivisionError else kind, match="of mine"), torch.no_grad():
            model(tokens, **with_cache(model, cache), use_cache=True)
        assert FAULT["left"] == 0
        FAULT["error"] = None

    cache = DynamicCache(config=model.config)
    fails(cache, IDS)
    assert not stores(cache)
    with torch.no_grad():  # the cache that was given is as empty as it was
        model(IDS, **with_cache(model, cache), use_cache=True)
    kept.update(stores(cache))
    twin = copy.deepcopy(cache)
    kept.update(stores(twin))
    assert len(kept) == 4
    fails(cache, tiny.tokens(2, 1))
    for other in (cache, copy.deepcopy(cache)):  # the first layer has the token, the second has not
        with pytest.raises(StaleCacheError, match="failed halfway"), torch.no_grad():
            model(tiny.tokens(2, 1), **with_cache(model, other), use_cache=True)
    with torch.no_grad():  # a copy from before that call is good
        model(tiny.tokens(2, 1), **with_cache(model, twin), use_cache=True)
    return kept


COMPILATIONS: dict[str, BaseException] = {
    "kvpass.pipeline.compose.compile_inner": RuntimeError("no compiler here"),
    "kvpass.lowering.lower.lower": torch.OutOfMemoryError("no memory here"),
    "kvpass.sites.scan.scan": KeyboardInterrupt("no patience here"),
}
"""What fails when a graph is compiled, and with what."""


@pytest.mark.parametrize("place", COMPILATIONS)
def test_a_compilation_that_fails(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and the next call compiles anew."""
    model, error = kvpass.compile(tiny.llama(layers=1), "h2o", BUDGET, **E), COMPILATIONS[place]
    cache = DynamicCache(config=model.config)

    def fails(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        for _ in range(2):
            with pytest.raises((type(error), Exception), match=r"no \w+ here"), torch.no_grad():
                model(IDS, **with_cache(model, cache), use_cache=True)
    assert not stores(cache)
    with torch.no_grad():
        model(IDS, **with_cache(model, cache), use_cache=True)
    assert [int(store.live().max()) for store in stores(cache)] == [BUDGET]


def test_an_interrupt_when_a_step_is_done_but_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots have the token, the cache does not know: it is refused, and a fork goes on."""
    model = kvpass.compile(tiny.llama(layers=1), "h2o", BUDGET, **E)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **with_cache(model, cache), use_cache=True)
        fork, token = kvpass.Cache(cache).fork(), tiny.tokens(2, 1)
        with monkeypatch.context() as patched:
            patched.setattr("kvpass.runtime.bind.Bound._returned", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(token, **with_cache(model, cache), use_cache=True)
        with pytest.raises(StaleCacheError, match="failed halfway"):
            model(token, **with_cache(model, cache), use_cache=True)
        model(token, **with_cache(model, fork), use_cache=True)
    assert fork.tokens == 91


def test_an_interrupt_leaves_a_models_attributes_alone() -> None:
    """A model that keeps its cache in attributes: what the interrupted call wrote there is not the model's."""
    model = plain.make(plain.AttributeDecoder)
    compiled = kvpass.compile(model, FAULTY, BUDGET, **E)
    FAULT.update(left=2, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        compiled(plain.tokens(1, 60))
    assert all(block.ck is None for block in model.blocks)
    fresh = plain.make(plain.AttributeDecoder)
    with torch.no_grad():
        torch.testing.assert_close(model(plain.tokens(1, 60)), fresh(plain.tokens(1, 60)))


def test_a_corrupted_policy(tmp_path: Path) -> None:
    """A file that ends anywhere, and weights that do, also after the model was compiled: told by name; with the file
    whole again the model goes on.
    """
    text = "name: mine\nextends: h2o\nprotect: {sinks: 2, recent: 0.5}\nmin_slots: 8\nbudget: 40\n"
    policy, weights = tmp_path / "mine.yaml", tmp_path / "q_filters.pt"
    model = tiny.llama(layers=1)
    for cut in range(len(text)):
        policy.write_text(text[:cut])
        with suppress(PolicyError):  # some are policies, of fewer words
            kvpass.Policy.load(str(policy))
    policy.write_bytes(text.encode()[:40] + b"\xff\x00[{" + text.encode()[40:])
    with pytest.raises(PolicyError):
        kvpass.compile(model, str(policy), **E)
    torch.save({"filters": torch.randn(1, 2, 16)}, weights)
    whole, spec = weights.read_bytes(), {"name": "mine", "extends": "q_filters", "options": {"file": str(weights)}}
    compiled = kvpass.compile(model, spec, BUDGET, **E)
    want = generated(compiled)
    for cut in (0, 7, len(whole) // 2, len(whole) - 3):
        weights.write_bytes(whole[:cut])
        os.utime(weights, ns=(cut, cut))  # a file is read again when it has changed
        with pytest.raises(PolicyError, match=r"q_filters\.pt"):
            kvpass.compile(model, spec, BUDGET, **E)
        with pytest.raises(PolicyError, match=r"q_filters\.pt"):
            generated(compiled)
    weights.write_bytes(whole)
    check_usable(compiled, want)
