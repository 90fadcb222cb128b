"""Blocks in which tokens are tentative: they attend, and can be taken back until a later call goes on from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from kvpass.errors import CacheError
from kvpass.runtime.active import current
from kvpass.runtime.store import SlotStore

DEPTH = 16
"""Tokens that a block of `kvpass.tentative` can take back, by default."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        depth: how many of a cache's last tokens can be taken back; all of a call's in any case.
        owner: the compiled model whose calls it is about; None: all.
        settled: length of the prompt, whose tokens are not tentative; 0: what begins a cache is one.
        single: calls in it are of one token each.
    """

    depth: int
    owner: Any = None
    settled: int = 0
    single: bool = False

    def note(self, store: SlotStore, new: int) -> None:
        """A call of `new` tokens is about to go on from a store.

        Raises:
            CacheError: it is of several.
        """
        if new > 1:
            raise CacheError(
                f"{new} tentative tokens in one call: their effect is that of {new} calls of one token",
                where=store.name,
                hint="give them one by one; a model of transformers that kvpass.compile compiled takes them together",
            )
        if store.journal is None:
            from kvpass.runtime.journal import Journal  # not when kvpass is imported

            store.journal = Journal()
        store.journal.note(store, self.depth)


_CURRENT: ContextVar[Block | None] = ContextVar("kvpass_drafts", default=None)


@contextmanager
def tentative(depth: int = DEPTH) -> Iterator[None]:
    """Let the tokens of the calls inside the block be tentative: drafts, probes. They attend and may evict, as ever;
    `cache.crop(-n)`, or a shorter past, in or behind the block makes the cache bit for bit what it was without them.
    `with kvpass.tentative(): model(drafts, past_key_values=cache)`.

    A call that goes on from a cache has the effect of calls of one token each, and as many steps. A call that begins
    one is a prompt, and settled. The first call outside of the block that goes on from a cache settles its tokens.

    Args:
        depth: how many of a cache's last tokens can be taken back, those of the last call in any case; each costs a
            copy of the cache's positions and statistics (docs/cache.md).

    Raises:
        CacheError: depth is no whole number above 0. When a model is called: several tokens at once go on from a cache
            in a form that is not known (docs/cache.md), or with `output_attentions`. When more is taken back than
            depth: StaleCacheError.
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise CacheError(f"depth={depth!r} is no whole number above 0", where="kvpass.tentative", hint="say depth=16")
    with entered(Block(depth)):
        yield


@contextmanager
def entered(block: Block | None) -> Iterator[None]:
    """Run a `with` body under a block; None: under none."""
    token = _CURRENT.set(block)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def opened_for(owner: Any) -> Block | None:
    """The block that a compiled model's call belongs to, if the call has not been taken apart yet."""
    block = _CURRENT.get()
    if block is None or block.single or (block.owner is not None and block.owner is not owner):
        return None
    return block


def drafting() -> Block | None:
    """The block that a graph's call belongs to; None: its tokens stay."""
    block = _CURRENT.get()
    if block is None or block.owner is None:
        return block
    noted = current()
    return block if noted is not None and noted.owner is block.owner else None


def of_one_token(block: Block, tokens: int) -> Block:
    """The block for each of the single calls that a call of so many tokens is made of."""
    return replace(block, depth=max(block.depth, tokens), single=True)
