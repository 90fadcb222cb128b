"""The tokens of a call of a model of transformers, fed again, for policies that wait for it (docs/design/0021)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvpass.model.asked import CACHES, cache_in, is_tokens
from kvpass.runtime.read_again import read_again, refuse_states, waiting_in
from kvpass.runtime.store import SlotStore


def after_call(
    run: Callable[..., Any], module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> None:
    """Replay what a call of a model of transformers brought, if it says its tokens; else they wait for `kvpass.replay`.

    Args:
        run: makes another call of the same function.
        module: whose forward was called, for the names of its arguments.
        result: what the call returned.

    Raises:
        CacheError: the cache holds states that a replay would change.
    """
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, cache = given.get("input_ids"), cache_in(given)
    cache = cache_in(result) if cache is None and isinstance(result, Mapping) else cache
    if (
        cache is None
        or not isinstance(ids, torch.Tensor)
        or not is_tokens(ids)
        or not set(CACHES) & {*names, *given}
        or "decoder_input_ids" in names
    ):
        return
    waiting = waiting_in(cache)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not waiting or waiting[0].unplayed != ids.shape[1]:
        return
    flat = isinstance(mask, torch.Tensor) and mask.shape == (len(ids), waiting[0].tokens)
    if not (mask is None or flat) or not (positions is None or positions.dim() == 2):
        return
    refuse_states(cache)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0
    name = next(one for one in CACHES if one in given or one in names)
    fixed: dict[str, Any] = {name: cache, "use_cache": True}
    if "logits_to_keep" in names:
        fixed["logits_to_keep"] = 1

    def feed(more: torch.Tensor, there: torch.Tensor) -> Any:
        return run(**fixed, **_along(given, waiting[0], valid, more, there))

    read_again(waiting, cache, ids, valid, feed)


def _along(
    given: Mapping[str, Any], store: SlotStore, valid: torch.Tensor, ids: torch.Tensor, there: torch.Tensor
) -> dict[str, Any]:
    """The arguments of a call with other tokens behind those of the last one."""
    mask, positions, count = given.get("attention_mask"), given.get("position_ids"), ids.shape[1]
    out: dict[str, Any] = {"input_ids": ids}
    if mask is not None or not bool(there.all()):
        before = torch.ones(len(ids), store.tokens, dtype=torch.long, device=ids.device) if mask is None else mask
        out["attention_mask"] = torch.cat([before, there.to(before)], 1)
    if positions is not None:
        last = torch.where(valid, positions.expand(len(ids), -1), -1).amax(-1, keepdim=True)
        out["position_ids"] = last + 1 + torch.arange(count, device=positions.device)
    if given.get("cache_position") is not None:
        out["cache_position"] = torch.arange(store.tokens, store.tokens + count, device=ids.device)
    return out
