"""What the host holds in place of its cache: copies branch, misuse is told, nothing is silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from oracle.drive import kept_positions
from oracle.hf import Oracle
from spelling import with_cache
from transformers import DynamicCache

import kvpass

pytestmark = pytest.mark.usefixtures("one_trace")


class Started:
    """A tiny model that has read 90 tokens and chosen one."""

    def __init__(self) -> None:
        self.original = tiny.one_llama(6, 2)
        self.model = kvpass.compile(self.original, "h2o", 48, inner="eager")
        self.cache = DynamicCache(config=self.original.config)
        self.prompt = tiny.tokens(2, 90)
        self.token = self.call(self.prompt)

    def call(self, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(ids, **with_cache(self.model, self.cache if cache is None else cache), logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)


@pytest.fixture
def started() -> Started:
    return Started()


def test_deepcopy_branches(started: Started) -> None:
    """Two continuations of one prompt, interleaved, each as if the other did not exist."""
    started.call(started.token)
    branches = [started.cache, copy.deepcopy(started.cache)]
    endings = [tiny.tokens(2, 12, seed=i) for i in range(2)]
    for t in range(12):
        for cache, ending in zip(branches, endings, strict=True):
            started.call(ending[:, t : t + 1], cache)
    for cache, ending in zip(branches, endings, strict=True):
        oracle = Oracle(started.original, "h2o", 48)
        for ids in (started.prompt, started.token, *ending.split(1, dim=1)):
            oracle(ids)
        oracle.simulator.follow(kept_positions(cache))
        assert oracle.simulator.near_ties == 0
    assert any(not torch.equal(a, b) for a, b in zip(*map(kept_positions, branches), strict=True))


def test_logical_shape_and_nan(started: Started) -> None:
    """The host sees the length that it believes in, and not one number of data."""
    for layer in started.cache.layers:
        for shell in (layer.keys, layer.values):
            assert shell.shape == (2, 2, 90, 16)
            assert shell.untyped_storage().nbytes() <= 16
            assert torch.isnan(shell).all()
    assert started.cache.get_seq_length() == 90


def crop(cache: Any) -> None:
    cache.crop(-3)


def slice_by_hand(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :40], layer.values[:, :, :40]


def clone(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def swap_layers(cache: Any) -> None:
    a, b = cache.layers
    a.keys, b.keys = b.keys, a.keys


@pytest.mark.parametrize("misuse", [crop, slice_by_hand, clone, swap_layers])
def test_misuse_is_told(started: Started, misuse: Callable[[Any], None]) -> None:
    def misused() -> None:
        misuse(started.cache)
        rows = started.cache.layers[0].keys.shape[0]
        started.call(started.token.repeat(rows // 2, 1))

    with pytest.raises(kvpass.KVPassError, match="what to do: ") as caught:
        misused()
    assert "layers" in str(caught.value) or "where: " in str(caught.value)


def test_stale_shell(started: Started) -> None:
    """The same cache on two branches without a copy: the second branch must not see the first one's slots."""
    branch = copy.copy(started.cache)
    branch.layers = [copy.copy(layer) for layer in started.cache.layers]
    started.call(started.token)
    with pytest.raises(kvpass.KVPassError, match="deepcopy"):
        started.call(started.token, branch)
    started.call(started.token)  # the branch that went ahead is unharmed


def test_an_error_leaves_the_model_usable(started: Started) -> None:
    crop(started.cache)
    with pytest.raises(kvpass.KVPassError):
        started.call(started.token)
    fresh = DynamicCache(config=started.original.config)
    assert torch.equal(started.call(started.prompt, fresh), started.token)


def test_foreign_cache(started: Started) -> None:
    """A dense cache that the unmodified model filled."""
    cache = DynamicCache(config=started.original.config)
    with torch.no_grad():
        started.original(started.prompt, **with_cache(started.original, cache))
    with pytest.raises(kvpass.KVPassError, match="what to do: "):
        started.call(started.token, cache)


def test_inspect_and_report(started: Started) -> None:
    """Positions, keys, values and bytes of the slots; the report adds up to the same."""
    started.call(started.token)
    layers = kvpass.inspect(started.cache).layers
    data = kvpass.report(started.cache).to_dict()
    dense = DynamicCache(config=started.original.config)
    with torch.no_grad():
        started.original(started.prompt, **with_cache(started.original, dense))
    for view, layer in zip(layers, dense.layers, strict=True):
        held = view.positions[1, 0]
        held = held[(held >= 0) & (held < 90)]
        assert len(held) in (47, 48)
        # Up to its first eviction the first layer's keys are the unmodified model's; deeper ones too, since
        # prefill saw everything.
        torch.testing.assert_close(view.keys[1, 0, : len(held)], layer.keys[1, 0, held], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(view.values[1, 0, : len(held)], layer.values[1, 0, held], rtol=1e-4, atol=1e-4)
    assert data["policy"] == "h2o"
    assert data["bytes"] == sum(site["bytes"] for site in data["sites"]) == sum(view.bytes for view in layers)
    assert data["dense_bytes"] == 2 * 2 * 2 * 2 * 91 * 16 * 4  # layers, K and V, rows, heads, tokens, head_dim, float32
    assert [site["layer"] for site in data["sites"]] == [0, 1]
    assert data["declined"] == []
    assert "h2o" in str(kvpass.report(started.cache))
