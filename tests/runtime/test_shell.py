"""Shells: what the host holds in place of its cache, through the public API, with plain decoders."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from models import plain
from torch import Tensor

import kvpass
from kvpass.errors import ForeignCacheError, KVPassError, ShellDataError, StaleCacheError, TrainingError
from kvpass.runtime.shell import find

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture
def model() -> Any:
    return kvpass.compile(plain.one(plain.Decoder), "h2o", 24, inner="eager")


def read(model: Any, length: int = 60, batch: int = 2) -> Any:
    with torch.no_grad():
        return model(plain.tokens(batch, length), None)[1]


def step(model: Any, cache: Any, length: int = 1, batch: int = 2) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return model(plain.tokens(batch, length, seed=length), cache)


def changed(cache: Any, change: Any) -> Any:
    return tuple((change(k), change(v)) for k, v in cache)


def test_logical_shape_nan_and_four_bytes(model):
    for k, v in read(model):
        for shell in (k, v):
            assert shell.shape == (2, 2, 60, 8)
            assert shell.isnan().all()
            assert shell.untyped_storage().nbytes() == 4
        assert find(k) is find(v)
        assert find(k).slots == 25


def test_tokens_before_heads():
    model = kvpass.compile(plain.make(plain.AttributeDecoder), "h2o", 24, inner="eager")
    with torch.no_grad():
        for length in (1, 30, 1):
            model(plain.tokens(1, length))
    assert {tuple(t.shape) for pair in model.cache for t in pair} == {(1, 32, 2, 8)}
    assert kvpass.report(model).to_dict()["tokens"] == 32


def test_copies_branch(model):
    cache = read(model)
    branch = copy.deepcopy(cache)
    assert find(branch[0][0]) is find(branch[0][1]) is not find(cache[0][0])
    one, _ = step(model, cache)
    two, later = step(model, branch)
    assert torch.equal(one, two)
    assert step(model, later, 3)[1][0][0].shape[2] == 64


def test_views_are_found_by_storage(model):
    for cache in (read(model), copy.deepcopy(read(model))):
        k, _ = cache[0]
        assert find(k[:, :, :10]) is find(k.transpose(1, 2)) is find(k) is not None
        for read_as_data in (lambda k=k: k + 1, k.clone):
            with pytest.raises(ShellDataError, match="as data"):
                read_as_data()
    assert find(torch.ones(2)) is None
    assert find("cache") is None


def test_the_store_dies_with_the_cache(model):
    cache = read(model)
    store, slots = weakref.ref(find(cache[0][0])), weakref.ref(find(cache[0][0]).state.k)
    del cache
    gc.collect()
    assert store() is None
    assert slots() is None


def test_a_past_that_was_used_up(model):
    cache = read(model)
    _, later = step(model, cache)
    with pytest.raises(StaleCacheError, match="60 tokens long, but its state has seen 61") as caught:
        step(model, cache)
    assert "deepcopy" in caught.value.hint
    assert "blocks.0" in caught.value.where
    step(model, later)


MISUSE: dict[str, tuple[Any, type[KVPassError], str]] = {
    "cropped": (lambda t: t[:, :, :50], StaleCacheError, "50 tokens long"),
    "tokens reordered": (lambda t: t[:, :, [1, 0]], ShellDataError, "as data"),
    "index_select": (lambda t: t.index_select(2, torch.tensor([0, 0])), ShellDataError, "along its first axis"),
    "cloned": (lambda t: t.clone(), ShellDataError, "as data"),
    "real": (lambda t: torch.zeros(t.shape), ForeignCacheError, "did not make"),
    "copied one by one": (lambda t: copy.deepcopy(t), ShellDataError, "NaN"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told(model, name):
    change, error, what = MISUSE[name]
    cache = read(model)

    def misuse():
        misused = changed(cache, change)
        step(model, misused, batch=misused[0][0].shape[0])

    with pytest.raises(error, match=what) as caught:
        misuse()
    assert caught.value.hint
    step(model, cache)  # and the cache is still good


def test_halves_that_change_places(model):
    cache = read(model)
    with pytest.raises(StaleCacheError, match="keys were given as values"):
        step(model, tuple((v, k) for k, v in cache))
    step(model, cache)


def test_layers_that_share_one_cache(model):
    cache = read(model)
    with pytest.raises(StaleCacheError, match="several layers"):
        step(model, (cache[0], tuple(t[:] for t in cache[0])))
    step(model, cache)


@pytest.mark.parametrize("copied", [False, True])
def test_shells_that_the_host_wrote_into(model, copied):
    """What is written into a copy before its first call is not found out: torch counts a copy's writes from anew."""
    cache = read(model)
    if copied:
        cache = step(model, copy.deepcopy(cache))[1]
    with pytest.raises(ShellDataError, match="zero_ reads"):
        cache[0][1].zero_()
    with torch._C.DisableTorchFunctionSubclass():
        cache[0][1].zero_()
    with pytest.raises(StaleCacheError, match="written to between two calls"):
        step(model, cache)


def test_a_call_that_failed_halfway(model):
    cache = step(model, read(model))[1]
    saved, state = copy.deepcopy(cache), find(cache[1][0]).state
    held, state.cursor = state.cursor, None
    with pytest.raises(RuntimeError, match="argument 'state'"):
        step(model, cache)
    state.cursor = held
    with pytest.raises(StaleCacheError, match="failed halfway"):
        step(model, cache)
    step(model, saved)


def test_keys_of_one_cache_with_values_of_another(model):
    one, two = read(model), read(model)
    mixed = tuple((k, v) for (k, _), (_, v) in zip(one, two, strict=True))
    with pytest.raises(ShellDataError):
        step(model, mixed)


def test_gradients_are_refused():
    model = kvpass.compile(plain.one(plain.Decoder), "h2o", 24, inner="eager")
    with pytest.raises(TrainingError, match="no gradients"):
        model(plain.tokens(1, 20), None)


def test_a_cache_begun_in_inference_mode_goes_on_without(model):
    with torch.inference_mode():
        _, cache = model(plain.tokens(2, 60), None)
    logits, cache = step(model, cache)
    expected, _ = step(model, read(model))
    torch.testing.assert_close(logits, expected)
    with torch.inference_mode():
        model(plain.tokens(2, 1), cache)


def test_growth_through_generation():
    """Bytes held stay near the budget, for a fraction and for slots."""
    for budget in (0.5, 40):
        model = kvpass.compile(plain.one(plain.Decoder), {"name": "mine", "min_slots": 8}, budget, inner="eager")
        cache = read(model, 50, 1)
        for _ in range(100):
            _, cache = step(model, cache, batch=1)
        report = kvpass.report(cache).to_dict()
        kept = 75 if budget == 0.5 else 40
        exact = report["dense_bytes"] * kept / 150
        assert exact < report["bytes"] <= exact * 1.025 + 2 * 2 * 2 * 8 * 4
