"""Every public method of transformers' caches on a compressed cache does what docs/cache.md says."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.kinds import KINDS
from models.page_tables import table
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

import kvpass
from kvpass.errors import KVPassError, ShellDataError

pytestmark = pytest.mark.usefixtures("one_trace")

PAGE = table("cache.md", "method of transformers' caches")
ROWS, LENGTH = 3, 60


class Talk:
    """A conversation of three rows: its cache, and what it says next."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self(tiny.tokens(ROWS, LENGTH))
        self(tiny.tokens(ROWS, 1, seed=1))

    def __call__(self, ids: Tensor, cache: Any = None) -> Tensor:
        given = with_cache(self.model, self.cache if cache is None else cache)
        with torch.no_grad():
            logits: Tensor = self.model(ids, **given, use_cache=True).logits[:, -1]
        return logits

    def goes_on(self, cache: Any, rows: list[int]) -> None:
        """As these rows of it would have."""
        step = tiny.tokens(ROWS, 1, seed=2)
        want = self(step)[rows]
        torch.testing.assert_close(self(step[rows], cache), want, rtol=1e-3, atol=1e-3)


def talk(kind: str) -> Talk:
    policy, budget = KINDS[kind]
    return Talk(kvpass.compile(tiny.one_llama(layers=2 if kind == "layers" else 1), policy, budget, inner="eager"))


def answers_as_dense(name: str, *args: Any) -> Callable[[str], None]:
    """It says of a compressed cache what it says of the model's own; also an error that it raises."""

    def check(kind: str) -> None:
        said = []
        for cache in (talk(kind).cache, Talk(tiny.one_llama(layers=1)).cache):
            try:
                found = getattr(cache, name)
                said.append(found(*args) if callable(found) else found)
            except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
                said.append((type(error), str(error)))
        assert said[0] == said[1], name

    return check


def picks(rows: list[int], pick: Callable[[Any], Any]) -> Callable[[str], None]:
    def check(kind: str) -> None:
        begun = talk(kind)
        picked = copy.deepcopy(begun.cache)
        picked = pick(picked) or picked
        begun.goes_on(picked, rows)

    return check


def through_a_file(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(cache: Any) -> Any:
    for layer in cache.layers:
        for name in ("keys", "values"):
            shell = getattr(layer, name)
            assert shell.to(shell.device) is shell
            setattr(layer, name, shell.cpu())
            with pytest.raises(ShellDataError):
                shell.to("meta")
    return cache


def crops(kind: str) -> None:
    """Tentative tokens are taken back; settled ones are not, unless nothing can have been evicted."""
    begun, again = talk(kind), talk(kind)
    with kvpass.tentative():
        begun(tiny.tokens(ROWS, 1, seed=5))
        begun(tiny.tokens(ROWS, 1, seed=6))
    begun.cache.crop(-2)
    assert begun.cache.get_seq_length() == LENGTH + 1
    begun.goes_on(again.cache, [*range(ROWS)])
    settled = copy.deepcopy(again.cache)
    settled.crop(-1)
    if kind != "fits":  # the words differ
        with pytest.raises(KVPassError, match="tentative"):
            again(tiny.tokens(ROWS, 1), settled)


def resets(kind: str) -> None:
    begun = talk(kind)
    begun.cache.reset()
    assert begun.cache.get_seq_length() == 0
    ids = tiny.tokens(ROWS, LENGTH, seed=7)
    assert torch.equal(begun(ids), begun(ids, DynamicCache(config=begun.model.config)))


def updates(kind: str) -> None:
    begun = talk(kind)
    key = torch.zeros(ROWS, 2, 1, 16)
    with pytest.raises(ShellDataError, match="joined by hand"):
        copy.deepcopy(begun.cache).update(key, key, 0)


def iterates(kind: str) -> None:
    cache = talk(kind).cache
    assert [keys.shape for keys, *_ in cache] == [(ROWS, 2, LENGTH + 1, 16)]
    assert len(cache) == 1
    assert "compressed cache" in repr(next(iter(cache))[0])
    for keys, *_ in cache:
        with pytest.raises(ShellDataError, match="reads a compressed cache as data"):
            keys.norm()


def offloads(kind: str) -> None:
    """Keys that are on the CPU stay there."""
    begun = talk(kind)
    moved_there = copy.deepcopy(begun.cache)
    moved_there.offload(0)
    begun.goes_on(moved_there, [*range(ROWS)])


NUMBERS = torch.tensor([2, 0, 2])
CHECKS: dict[str, Callable[[str], None]] = {
    "get_seq_length": answers_as_dense("get_seq_length"),
    "get_mask_sizes": answers_as_dense("get_mask_sizes", 3, 0),
    "get_query_offset": answers_as_dense("get_query_offset"),
    "get_max_length": answers_as_dense("get_max_length"),
    "batch_size": answers_as_dense("batch_size"),
    "is_compileable": answers_as_dense("is_compileable"),
    "is_croppable": answers_as_dense("is_croppable"),
    "is_initialized": answers_as_dense("is_initialized"),
    "is_sliding": answers_as_dense("is_sliding"),
    "is_linear": answers_as_dense("is_linear"),
    "is_dummy": answers_as_dense("is_dummy"),
    "is_recording_past": answers_as_dense("is_recording_past", 0),
    "activate_past_recording": answers_as_dense("activate_past_recording"),
    "has_previous_state": answers_as_dense("has_previous_state"),
    "get_conv_state": answers_as_dense("get_conv_state", 0),
    "get_recurrent_state": answers_as_dense("get_recurrent_state", 0),
    "update_conv_state": answers_as_dense("update_conv_state", torch.zeros(1), 0),
    "update_recurrent_state": answers_as_dense("update_recurrent_state", torch.zeros(1), 0),
    "update_indexer": answers_as_dense("update_indexer", torch.zeros(1), 0),
    "early_initialization": answers_as_dense("early_initialization", ROWS, 2, 16, torch.float32, torch.device("cpu")),
    "prefetch": answers_as_dense("prefetch", 0),
    "offload": offloads,
    "reorder_cache": picks(NUMBERS.tolist(), lambda cache: cache.reorder_cache(NUMBERS)),
    "batch_select_indices": picks([1, 0], lambda cache: cache.batch_select_indices(torch.tensor([1, 0]))),
    "batch_repeat_interleave": picks([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    "crop": crops,
    "reset": resets,
    "update": updates,
    "iteration, len, repr": iterates,
    "copy.deepcopy": picks([0, 1, 2], copy.deepcopy),
    "pickle": picks([0, 1, 2], lambda cache: pickle.loads(pickle.dumps(cache))),
    "torch.save": picks([0, 1, 2], through_a_file),
    "to(device) of keys and values": picks([0, 1, 2], moved),
}
PICKING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset", "pickle")
"""What is done to slots: on each kind of them. The others look at no slots."""


@pytest.mark.parametrize("name", CHECKS)
def test_a_method(name: str) -> None:
    CHECKS[name]("even")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.wide) if kind in ("a share", "layers") else kind
        for kind in KINDS
        if kind != "even"
    ],
)
def test_whatever_slots_hold(kind: str) -> None:
    for name in PICKING:
        CHECKS[name](kind)


def test_no_method_is_left_out() -> None:
    """Of the installed transformers, and on the page."""
    names = {name for cls in (Cache, DynamicCache, StaticCache) for name in vars(cls) if not name.startswith("_")}
    assert names <= set(CHECKS), f"transformers has a new one: {names - set(CHECKS)}"
    told = {name for cell in PAGE for name in re.findall(r"`([^`]+)`", cell)}
    assert told == set(CHECKS)
