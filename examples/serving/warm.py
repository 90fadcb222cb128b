"""Everything is compiled before the first request: no request waits for a compiler, and none compiles anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import kvpass
from serving.batch import forward
from serving.prefixes import Prefix, Prefixes

LENGTHS = (45, 70, 1)
"""Of prompts: Dynamo compiles the first size as it is, then one graph for others; a single token is a size of its
own.
"""


def warmed(model: Any, beginnings: Sequence[Sequence[int]]) -> tuple[kvpass.Cache, Prefixes]:
    """A cache of the model, for its bounds, and caches of what prompts will begin with.

    Raises:
        ValueError: requests could not share a batch under this policy.
    """
    check(model.kvpass.policy)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    words = [1 + at % (vocabulary - 1) for at in range(200)]
    alone = [_run(model, None, words[:length]) for length in LENGTHS]
    for many in (alone[:2], alone):  # the first number of rows is compiled as it is, too
        _decoded(model, kvpass.Cache.merge(many))
    batch = kvpass.Cache.merge(alone)
    for rows in ([2, 0], [1]):
        _decoded(model, batch.select(rows, trim=True))
    prefixes = Prefixes([Prefix(tuple(ids), _prompt(model, None, ids)) for ids in beginnings])
    for cache in prefixes.caches or []:
        for length in (9, 5, 1):
            _run(model, cache.fork(), words[:length])
    return alone[0], prefixes


def check(policy: Any) -> None:
    """Raises ValueError if rows of a batch would not keep what each would keep alone."""
    said = [policy.every, *(one.get("every", 1) for one in policy.layers.values() if isinstance(one, dict))]
    if max(said) > 1:
        raise ValueError(
            f"policy {policy.name!r} lets evictions wait for more steps (`every: {max(said)}`), which a batch counts "
            "together: what a request keeps would depend on who else is served. Leave `every` out"
        )


def _prompt(model: Any, cache: kvpass.Cache | None, ids: Sequence[int]) -> kvpass.Cache:
    end = len(ids) + (cache.tokens if cache is not None else 0)
    return forward(model, cache, torch.tensor([list(ids)]), [end])[1]


def _run(model: Any, cache: kvpass.Cache | None, ids: Sequence[int]) -> kvpass.Cache:
    return _decoded(model, _prompt(model, cache, ids))


def _decoded(model: Any, cache: kvpass.Cache) -> kvpass.Cache:
    """After three steps: the first one's length is compiled as it is."""
    for _ in range(3):
        ends = (cache.tokens + 1 - cache.padding).tolist()
        cache = forward(model, cache, torch.ones(cache.rows, 1, dtype=torch.long), ends)[1]
    return cache
