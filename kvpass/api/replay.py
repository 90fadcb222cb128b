"""`kvpass.replay`: tokens of a cache that are fed again, for models that kvpass does not know how to call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.model.asked import CACHES, is_tokens


def replay(
    model: Any, cache: Any, ids: torch.Tensor, *, mask: Any = None, call: Callable[..., Any] | None = None
) -> Any:
    """Replay the tokens of the last call on a cache, and let it evict: what policies with `observe: {replay: repeat}`
    wait for. `kvpass.compile` does so by itself where a model is called as those of transformers are.

    Args:
        model: compiled, in the form in which it was called.
        cache: what the last call left: an object, or nested tuples and lists. It stays what it is, but for its slots.
        ids: int [B, T], the tokens of that call.
        mask: bool (or 0 and 1) [B, T], which of them are tokens; None: all. The others are padding.
        call: `call(ids, cache, there)` runs the model on more tokens, int64 [B, S], which go on from the cache; of
            these `there`, bool [B, S], are tokens, the others padding behind them. None: `model(ids, cache)`, or by the
            names of transformers, where no row is padded.

    Returns the cache.

    Raises:
        CacheError: no token of it waits; ids or mask do not fit; the cache is a module; rows are of unequal length and
            nobody says how the model is told.
    """
    from kvpass.runtime.read_again import read_again, refuse_states, waiting_in  # much of the runtime

    where = "kvpass.replay"
    if isinstance(cache, torch.nn.Module):
        hint = "give the cache itself, or use kvpass.compile and call the model with input_ids"
        raise CacheError("a cache that is a module's attributes cannot be put back", where=where, hint=hint)
    waiting = waiting_in(cache)
    if not waiting:
        hint = "it is for policies that replay, e.g. kvzip, once after each call of several tokens"
        raise CacheError("no token of this cache waits for a replay", where=where, hint=hint)
    batch, tokens = len(waiting[0].state.cursor), waiting[0].unplayed
    valid = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else torch.as_tensor(mask) != 0
    if not is_tokens(ids) or ids.shape != (batch, tokens) or valid.shape != ids.shape:
        given = f"ids {list(getattr(ids, 'shape', []))}, mask {list(valid.shape)}"
        hint = "give the ids of the cache's last call, and its mask of the same shape"
        raise CacheError(f"{given} for the last {tokens} tokens of {batch} sequences", where=where, hint=hint)
    refuse_states(cache)
    read_again(waiting, cache, ids, valid.to(ids.device), _feeding(model, cache, call))
    return cache


def _feeding(model: Any, cache: Any, call: Callable[..., Any] | None) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    names = inspect.signature(getattr(model, "forward", model)).parameters
    name = next((one for one in CACHES if one in names), None) if "input_ids" in names else None

    def feed(ids: torch.Tensor, there: torch.Tensor) -> Any:
        if call is not None:
            return call(ids, cache, there)
        if not bool(there.all()):
            hint = "say call=lambda ids, cache, there: model(..), with the mask that the model takes"
            raise CacheError("some rows have fewer tokens to repeat than others", where="kvpass.replay", hint=hint)
        return model(ids, cache) if name is None else model(input_ids=ids, use_cache=True, **{name: cache})

    return feed
