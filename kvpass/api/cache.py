"""A compressed cache as one object: what it holds, and other caches made of it."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch

from kvpass.api.holdings import cache_of, holdings, stores
from kvpass.api.report import LayerView, layer_view
from kvpass.api.saving import load, save
from kvpass.errors import CacheError
from kvpass.runtime.wrapped import Wrapped


class Cache(Wrapped):
    """The cache of a kvpass-compiled model, whatever its host keeps it in.

    Nothing is copied: the wrapper and its host are the same cache, and a compiled model takes either
    (`model(ids, past_key_values=kvpass.Cache(out))`).

    Args:
        host: an HF Cache, a tuple of pairs, a list, a dict, or a model's output that has a cache. One that is still
            empty is a cache of no tokens.

    Raises:
        CacheError: it is a module, whose attributes hold more than a cache, or None.

    Attributes:
        host: the host's cache again.
    """

    def __init__(self, host: Any) -> None:
        if isinstance(host, Wrapped):
            host = host.host
        host = cache_of(host)
        if host is None or isinstance(host, torch.nn.Module):
            raise CacheError(
                f"a {type(host).__name__} is no cache",
                hint="give kvpass.Cache what the model returned, out.cache (out.past_key_values before transformers "
                "5.24), or the list or object that the model keeps its keys and values in",
            )
        super().__init__(host)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a safetensors file: slots, positions, statistics, and whose they are. The file is there whole, or
        what was there before still is.

        Raises:
            CacheError: the host, or something in it, cannot be made again from a file (named); there are no slots; or
                the file cannot be written.
            StaleCacheError: it was cropped, another branch has gone on with it, or a call on it failed.
        """
        save(self.host, path)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Any) -> Cache:
        """The cache that `save` wrote, on the model's device. It belongs to this model from here on.

        Args:
            model: what `kvpass.compile` returned, with the policy, budget and weights that the cache was made with.

        Raises:
            CacheError: no such file, one of another format or version, or a damaged one.
            StaleCacheError: another policy, budget or model made it.
        """
        return cls(load(path, model))

    @property
    def tokens(self) -> int:
        """Logical length: tokens seen, padding included."""
        return max((store.tokens for store in stores(self.host)), default=0)

    @property
    def bytes(self) -> int:
        """Bytes that all its keys, values and states hold, as `kvpass.report` counts them: what forks share counts in
        each of them (`Cache.held` counts it once).
        """
        return holdings(self.host).bytes

    @property
    def rows(self) -> int:
        """Sequences; 0 while it is empty."""
        return max((len(store.state.cursor) for store in stores(self.host)), default=0)

    def __len__(self) -> int:
        """Compressed layers."""
        return len(stores(self.host))

    def __bool__(self) -> bool:
        """A cache is one before its first token too."""
        return True

    def __iter__(self) -> Iterator[LayerView]:
        """The live slots of each layer, copies: as `kvpass.inspect(cache).layers`."""
        return (layer_view(store) for store in stores(self.host))

    def __repr__(self) -> str:
        found = stores(self.host)
        if not found:
            return f"kvpass.Cache({type(self.host).__name__}, empty)"
        policy, budget = found[0].origin.policy, found[0].origin.budget
        under = policy if budget is None else f"{policy} {budget}"
        live = max(int(store.live().max()) for store in found)
        return (
            f"kvpass.Cache({type(self.host).__name__} under {under}: {self.rows} rows, {self.tokens} tokens, "
            f"{len(found)} layers of at most {live} slots, {self.bytes:,} bytes)"
        )
