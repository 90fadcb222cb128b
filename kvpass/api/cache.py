"""A compressed cache as one object: what it holds, and other caches made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from kvpass.api.holdings import cache_of, holdings, stores
from kvpass.api.live_slots import LayerView, layer_view
from kvpass.errors import CacheError
from kvpass.kernels.slots.cursor import FIRST, SEEN
from kvpass.runtime.pick import with_rows
from kvpass.runtime.store import SlotStore
from kvpass.runtime.wrapped import Wrapped

if TYPE_CHECKING:
    from kvpass.api.bounds import Bounds


class Cache(Wrapped):
    """The cache of a kvpass-compiled model, whatever its host keeps it in.

    Nothing is copied: the wrapper and its host are the same cache, and a compiled model takes either
    (`model(ids, cache=kvpass.Cache(out))`).

    Args:
        host: an HF Cache, a tuple of pairs, a list, a dict, or a model's output that has a cache. One that is still
            empty is a cache of no tokens.

    Raises:
        CacheError: it is a module, whose attributes hold more than a cache, or nothing that holds anything.

    Attributes:
        host: the host's cache again.
    """

    def __init__(self, host: Any) -> None:
        given, host = host, cache_of(host)
        if host is not given and isinstance(host, list) and len(host) == 1:  # (logits, cache)
            host = host[0]
        holds = isinstance(host, (tuple, list, dict)) or hasattr(host, "__dict__")
        if not holds or isinstance(host, torch.nn.Module):
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
        from kvpass.api.saving import save

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
        from kvpass.api.saving import load  # and Dynamo, which `import kvpass` need not load

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

    @property
    def padding(self) -> torch.Tensor:
        """Columns in front of the first token of each row: int64 [rows]. Of a merged cache, what each row's attention
        mask must have in front of its own.
        """
        cursor = self._some()[0].state.cursor[:, 0].long()
        first = cursor[:, FIRST]
        return torch.where(first < 0, self.tokens, first)

    def mask(self) -> torch.Tensor:
        """The attention mask of what is cached: int64 [rows, tokens], 0 for padding. Put the ones of a call's new
        tokens behind it.

        Raises:
            CacheError: the cache is empty; or padding stands between tokens of a row, which only the caller's own mask
                tells.
        """
        cursor, padding = self._some()[0].state.cursor[:, 0].long(), self.padding
        apart = (cursor[:, SEEN] + padding != self.tokens).nonzero().flatten()
        if len(apart):
            raise CacheError(
                f"padding stands between or behind the tokens of row {int(apart[0])}: where, the cache does not know",
                hint="put padding[row] zeros in front of the row's own attention mask",
            )
        return (torch.arange(self.tokens, device=padding.device) >= padding[:, None]).long()

    def fork(self) -> Cache:
        """Another cache that goes on from here by itself. Copy on write: both share the slots of a layer until a call
        on one of them is about to change them; then that layer is copied. What the host keeps beside compressed layers
        is copied at once.

        Raises:
            CacheError: several layers lie in one buffer of the host's.
        """
        from kvpass.api.rehoused import rehoused  # here and below: what `import kvpass` need not load

        return Cache(rehoused(self.host, SlotStore.fork, lambda _: None))

    def select(self, rows: Any, trim: bool = False) -> Cache:
        """Another cache of some of the sequences; this one stays as it is. Costs a copy of their slots.

        Args:
            rows: numbers, in any order and with repeats: a list or int tensor [n]; or flags, bool [rows].
            trim: also without the columns that are padding in all of them, and without slots that only longer rows
                needed: `tokens` is then the length of the longest one picked, and masks are as much shorter.

        Raises:
            CacheError: the cache is empty, no row is asked for, or one that it has not; or something of the host's lies
                beside the compressed layers, whose sequences are not known; or it is to be trimmed, and its host counts
                tokens in another way than by its keys, or has preallocated its cache.
        """
        from kvpass.api.asked_rows import numbers_of
        from kvpass.api.rehoused import picked, rehoused, trimming

        self._some()
        at = numbers_of(rows, self.rows)
        data = picked(self.host, at)
        if not trim:
            return Cache(rehoused(self.host, lambda store: with_rows(store, at), data))
        columns = int(self.padding[at.to(self.padding.device)].min())
        return Cache(trimming(self.host, at, columns, data))

    def repeat(self, n: int) -> Cache:
        """Another cache in which each sequence stands `n` times, one behind the other (0, 0, 1, 1): as
        `torch.repeat_interleave` along rows. Costs a copy of the slots; `fork` shares them.

        Raises:
            CacheError: as of `select`.
        """
        return self.select(torch.arange(self.rows).repeat_interleave(n))

    @staticmethod
    def merge(caches: Sequence[Any]) -> Cache:
        """A cache of all sequences of several ones, in order, which stay as they are: requests join a batch. Costs a
        copy of all slots.

        Its length is that of the longest: shorter rows are as if they had been padded on the left, so masks of later
        calls need `padding` zeros in front of each row's own, and position ids must count a row's own tokens, as
        `generate` makes them. What each row keeps, and what its statistics say, is as it was; where evictions wait
        (`every`) for different numbers of steps, they are done first.

        Args:
            caches: of `kvpass.Cache` or what it takes; one model's, under one policy and budget.

        Raises:
            StaleCacheError: they are of different models, policies or budgets.
            CacheError: there is none, one is empty, or they do not fit together.
        """
        from kvpass.api.rehoused import beside, rehoused
        from kvpass.runtime.join import joined

        wrapped = [one if isinstance(one, Cache) else Cache(one) for one in caches]
        if not wrapped:
            raise CacheError("there is no cache to merge", hint="give a list of at least one")
        longest = max(wrapped, key=lambda one: one.tokens)
        found = [one._some() for one in wrapped]
        if len({len(some) for some in found}) > 1:
            counts = ", ".join(str(len(some)) for some in found)
            raise CacheError(f"these caches have {counts} compressed layers", hint="merge caches of one model")
        lists = {id(own[at]): [some[at] for some in found] for own in (longest._some(),) for at in range(len(own))}
        data = beside([one.host for one in wrapped])
        return Cache(rehoused(longest.host, lambda store: joined(lists[id(store)]), data))

    def crop(self, n: int) -> None:
        """Take the last `n` tokens back, in place: `cache.crop(-n)` of transformers 5.24. Exact: where nothing can have
        been evicted because of them, or while they are tentative (`kvpass.tentative`).

        Raises:
            CacheError: there are not so many tokens; or some of them may have displaced or scored others. The cache is
                as it was.
        """
        from kvpass.api.crop import crop

        crop(self.host, n)

    @staticmethod
    def held(caches: Sequence[Any], overhead: bool = False) -> int:
        """Bytes that all keys, values and states of several caches hold together; what forks share, once.

        Args:
            overhead: count positions and statistics of slots too.
        """
        found = holdings([cache_of(one) for one in caches])
        return found.bytes + (sum(store.overhead_bytes for store in found.states) if overhead else 0)

    def bounds(self) -> Bounds:
        """How many bytes caches of the same model and policy can hold at most, by what will be fed to them; all that a
        slot costs is counted, as by `held(overhead=True)`. Keeps no tensor of this cache.

        Raises:
            CacheError: the cache is empty, or something lies beside its compressed layers.
        """
        from kvpass.api.bounds import bounds

        return bounds(self.host)

    def _some(self) -> list[SlotStore]:
        found = stores(self.host)
        if not found:
            raise CacheError("the cache holds no token yet", hint="run a prompt through the compiled model first")
        return found
