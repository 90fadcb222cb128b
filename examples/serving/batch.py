"""Requests that generate together: rows of one cache, whose mask says how much of each is padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from spelling import cache_of, with_cache

import kvpass
from serving.request import Request


def forward(model: Any, cache: kvpass.Cache | None, ids: torch.Tensor, ends: Sequence[int]) -> tuple[Any, kvpass.Cache]:
    """Logits [B, V] behind the last of the new tokens, and the cache with them in it.

    Args:
        cache: None: these tokens begin one. It is changed.
        ids: int64 [B, S]; rows that are shorter than the cache have padding in front, which it knows.
        ends: tokens of each row, the new ones included.
    """
    own, new = torch.tensor(ends)[:, None], ids.shape[1]
    columns = torch.arange((cache.tokens if cache is not None else 0) + new)
    given: dict[str, Any] = {
        "attention_mask": (columns >= len(columns) - own).long(),
        "position_ids": own - new + torch.arange(new),
        "use_cache": True,
    }
    if cache is not None:
        given |= with_cache(model, cache)
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        given["logits_to_keep"] = 1
    device = model.device
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with torch.no_grad():
        out = model(ids.to(device), **given)
    return out.logits[:, -1], kvpass.Cache(cache_of(out))


class Batch:
    """
    Args:
        watch: called with all caches that are held besides, whenever something has changed and nothing is dropped yet.
    """

    def __init__(self, model: Any, watch: Callable[[list[kvpass.Cache]], None] = lambda caches: None) -> None:
        self.model, self.watch = model, watch
        self.requests: list[Request] = []
        self.cache: kvpass.Cache | None = None

    def begin(self, request: Request) -> tuple[Any, kvpass.Cache]:
        """Logits [V] behind a request's prompt, and a cache of it alone."""
        prompt, cache = request.asked.prompt, None
        if request.prefix is not None:
            cache = request.prefix.cache.fork()
        rest = prompt[cache.tokens if cache is not None else 0 :]
        logits, cache = forward(self.model, cache, torch.tensor([rest]), [len(prompt)])
        request.fed = len(prompt)
        self.watch([*self._held(), cache])
        return logits[0], cache

    def join(self, request: Request, cache: kvpass.Cache) -> None:
        """Let a request whose prompt is in `cache` generate with the others, from the next step on."""
        whole = kvpass.Cache.merge([self.cache, cache]) if self.cache is not None else cache
        self.watch([*self._held(), cache, whole])
        self.cache = whole
        self.requests.append(request)

    def leave(self, gone: Sequence[Request]) -> None:
        """Without these; the others' cache is no longer than the longest of them."""
        rows = [row for row, request in enumerate(self.requests) if request not in gone]
        if len(rows) == len(self.requests):
            return
        left = self.cache.select(rows, trim=True) if rows and self.cache is not None else None
        self.watch([*self._held(), *([left] if left is not None else [])])
        self.cache, self.requests = left, [self.requests[row] for row in rows]

    def step(self) -> Any:
        """Logits [B, V] of the next token of each request."""
        for request in self.requests:
            request.fed += 1
        ids = torch.tensor([[request.token] for request in self.requests])
        logits, self.cache = forward(self.model, self.cache, ids, [request.fed for request in self.requests])
        self.watch(self._held())
        return logits

    def drop(self) -> list[Request]:
        """Forget all of them, say after an error; who they were."""
        dropped, self.requests, self.cache = self.requests, [], None
        return dropped

    def _held(self) -> list[kvpass.Cache]:
        return [self.cache] if self.cache is not None else []
