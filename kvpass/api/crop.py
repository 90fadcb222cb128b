"""Tokens taken back from a host's cache: in its stores, its shells and its own counters."""

from __future__ import annotations

from typing import Any

import torch

from kvpass.api.holdings import stores, tensors_in
from kvpass.api.rehoused import standing_for
from kvpass.errors import CacheError
from kvpass.runtime.pick import require_whole, still_tentative, take_back
from kvpass.runtime.shell import attach, is_shell, make
from kvpass.runtime.store import SlotStore
from kvpass.runtime.veil import Shell, unveil, veil


def crop(host: Any, n: int) -> None:
    """Take the last `n` tokens back, in place; arguments and errors as of `kvpass.Cache.crop`."""
    found = stores(host)
    tokens = max((store.tokens for store in found), default=0)
    if not 0 <= n < max(tokens, 1):
        raise CacheError(
            f"{n} tokens are to be taken back of {tokens}",
            hint="give how many tokens to remove, at least 0 and less than there are; begin again with an empty cache",
        )
    if n == 0:
        return
    own = getattr(host, "crop", None)
    parts = list(tensors_in(host))
    if own is None and any(standing_for(part) is None and part.tensor.dim() > 1 for part in parts):
        raise CacheError(
            f"a {type(host).__name__} holds more than compressed layers, and cannot be cropped as a whole",
            hint="keep the cache in an HF Cache, or copy.deepcopy it before the tokens that may have to go",
        )
    for store in found:
        require_whole(store)
    in_order = sorted(found, key=lambda one: not one.rule.evicts)  # whatever refuses comes first
    for done, store in enumerate(in_order):
        if not take_back(store.owned(), store.tokens - n):
            for other in found if done else []:
                other.spoiled = True
            raise CacheError(
                f"{n} tokens cannot be taken back: they may have displaced others",
                where=store.name,
                hint=f"{still_tentative(store)}; or keep cache.fork() from before",
            )
    if own is not None:
        own(-n)
        return
    for part in parts:
        standing = standing_for(part)
        if standing is not None and is_shell(part.tensor):
            _shorten(part.tensor, *standing)


def _shorten(shell: torch.Tensor, store: SlotStore, half: int) -> None:
    """The same tensor object, as long as its store is now: its host has it in places that nobody knows."""
    if store.length is not None:
        return
    spoke = type(shell) is Shell
    unveil([shell])
    shell.data = make(store, half).data
    attach(shell, (), store, half)
    veil([shell] if spoke else [])
