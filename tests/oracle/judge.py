"""transformers' own `generate` on the unmodified model, in which each cache sees what a naive cache of its own history
kept: what any request means under a policy.

    judge = judge_of(model, "h2o", 0.25)
    out = judge.generate(ids, num_beams=3, ...)
    judge.of(out.cache).kept(layer)

Every cache that the request makes has a simulator; where rows of the one go, rows of the other go too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from oracle.anyhf import Watch, watching
from oracle.hf import ACTIVE, Oracle, twin
from oracle.simulator import Simulator
from spelling import cache_of, given_cache
from transformers.cache_utils import Cache

ROWS: dict[str, Callable[[int, Any], list[int]]] = {
    "reorder_cache": lambda rows, picked: picked.tolist(),
    "batch_select_indices": lambda rows, picked: torch.arange(rows)[picked].tolist(),
    "batch_repeat_interleave": lambda rows, times: [row for row in range(rows) for _ in range(times)],
}
"""What a method of transformers' caches makes of their rows."""


class Judge:
    """A model of which every layer evicts (`oracle.hf`: any policy, models that take an attention function).

    Args:
        begin: makes the simulator of an empty cache.
    """

    def __init__(self, model: Any, begin: Callable[[], Simulator]) -> None:
        self.model, self.begin = self.twin(model), begin
        self.followed: dict[int, tuple[Any, Simulator]] = {}
        inner = self.model.forward
        self.model.forward = functools.wraps(inner)(lambda *args, **given: self.call(inner, args, given))

    def twin(self, model: Any) -> Any:
        return twin(model)

    @property
    def config(self) -> Any:
        return self.model.config

    def generate(self, *args: Any, **asked: Any) -> Any:
        with self.following():
            return self.model.generate(*args, **asked)

    def of(self, cache: Any) -> Simulator:
        """The simulator of a cache: a new one for a new cache, which is kept alive, so that no other takes its id."""
        cache = getattr(cache, "self_attention_cache", cache)
        return self.followed.setdefault(id(cache), (cache, self.begin()))[1]

    def call(self, inner: Any, args: Any, given: dict[str, Any]) -> Any:
        """A call of the model itself."""
        cache = given_cache(given)
        simulator = self.begin() if cache is None else self.of(cache)
        out = self.attended(simulator, cache, inner, args, given)
        if cache is None and cache_of(out) is not None:
            self.followed[id(cache_of(out))] = (cache_of(out), simulator)
        return out

    def attended(self, simulator: Simulator, cache: Any, inner: Any, args: Any, given: dict[str, Any]) -> Any:
        ACTIVE.append(simulator)
        try:
            return inner(*args, **given)
        finally:
            ACTIVE.pop()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, rows of a simulator go where its cache's go. For loops by hand; `generate` is in it."""
        with ExitStack() as stack:
            for name, rows in ROWS.items():
                stack.enter_context(mock.patch.object(Cache, name, self.method(name, rows)))
            yield

    def method(self, name: str, rows: Callable[[int, Any], list[int]]) -> Any:
        original = getattr(Cache, name)

        def changed(cache: Cache, asked: Any) -> None:
            simulator = self.followed.get(id(cache), (None, None))[1]
            if simulator is not None and simulator.layers:
                simulator.pick(rows(len(next(iter(simulator.layers.values())).heads), asked))
            original(cache, asked)

        return changed


class AnyJudge(Judge):
    """Any model of transformers, of which the layers in `evicting` evict (`oracle.anyhf`)."""

    def __init__(self, model: Any, begin: Callable[[], Simulator], evicting: set[int]) -> None:
        self.evicting = evicting
        super().__init__(model, begin)

    def twin(self, model: Any) -> Any:
        return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})

    def attended(self, simulator: Simulator, cache: Any, inner: Any, args: Any, given: dict[str, Any]) -> Any:
        mask = None if self.model.config.is_encoder_decoder else given.get("attention_mask")
        watch = Watch(simulator, self.evicting, mask)
        with torch.no_grad(), watching(watch, cache):
            out = inner(*args, **given)
        watch.finish()
        return out


def judge_of(
    model: Any, policy: str, budget: float | int, floor: int = 64, make: Callable[..., Simulator] = Simulator
) -> Judge:
    """A judge whose simulators know what a policy may ask of the model."""
    like = Oracle(model, policy, budget, floor).simulator

    def begin() -> Simulator:
        made = make(policy, budget, floor)
        made.depth, made.outward, made.angles = like.depth, like.outward, like.angles
        return made

    return Judge(model, begin)
