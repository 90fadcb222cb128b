"""What a cache's tokens were, for `generate` in later turns: a history that was shortened or edited is not the cache's.

transformers compares neither: of tokens that are not longer than the cache it feeds all or others again, and of edited
ones it feeds what is behind the old length. An evicted token cannot be taken back, so both are refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvpass.errors import StaleCacheError
from kvpass.model.asked import Asked, cache_in, is_tokens, length_of, prompt_in
from kvpass.runtime.shell import find
from kvpass.runtime.store import SlotStore
from kvpass.runtime.watch import tensors


@dataclass(frozen=True)
class Said:
    """The tokens of a cache when `generate` left it, int64 [B, T], and the calls that had been made on it by then."""

    ids: torch.Tensor
    calls: int


_SAID: WeakKeyDictionary[SlotStore, Said] = WeakKeyDictionary()
"""By the first store of a cache."""


def check_history(model: Any, args: Sequence[Any], given: dict[str, Any]) -> None:
    """Refuse a turn whose tokens do not continue those of its cache.

    Raises:
        StaleCacheError: it has no token beyond them, or others in their place.
    """
    cache = cache_in(given)
    length = length_of(cache)
    if not length or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    ids = prompt_in(args, given)
    embeds = given.get("inputs_embeds")
    shown = embeds if isinstance(embeds, torch.Tensor) else ids
    if shown is None:
        return
    mask = given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != shown.shape[1]:
        _check_new_alone(mask.shape[1], shown.shape[1], length, embeds is not None)
        return
    if shown.shape[1] <= length:
        raise StaleCacheError(
            f"generate was given {shown.shape[1]} tokens, but its cache holds {length}",
            where="generate()",
            hint="give it the whole conversation, all tokens of the cache and new ones behind them; or new tokens "
            "alone and a mask for all; a shortened history begins from an empty cache, or from a copy made before",
        )
    store = _first_store(cache)
    said = _SAID.get(store) if store is not None else None
    if said is None or store is None or said.calls != store.calls or embeds is not None or ids is None:
        return
    before = said.ids[:, :length].to(ids.device)  # of which some may have been taken back since
    if len(ids) != len(before):
        return
    other = ids[:, : before.shape[1]] != before
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        other = other & (mask[:, : other.shape[1]] != 0).to(other.device)
    if bool(other.any()):
        row, at = other.nonzero()[0].tolist()
        raise StaleCacheError(
            f"the history was edited: token {at} of row {row} is {int(ids[row, at])}, but the cache was made of "
            f"{int(said.ids[row, at])} there",
            where="generate()",
            hint="begin from an empty cache; or continue with the very tokens that generate returned (text that is "
            "tokenised again may give others)",
        )


def _check_new_alone(mask: int, shown: int, length: int, embedded: bool) -> None:
    """A mask of another length tells transformers that the tokens are new ones alone: it feeds them all.

    Raises:
        StaleCacheError: the mask is not that of the cache and the tokens; or they are embeddings, which it slices all
            the same.
    """
    if mask != length + shown or embedded:
        raise StaleCacheError(
            f"generate was given {shown} tokens and an attention mask for {mask}: no match for its cache of {length}",
            where="generate()",
            hint=f"give it the whole conversation and a mask as long; or new tokens alone (no embeddings) and a mask "
            f"for all {length + shown} tokens",
        )


def note_history(model: Any, given: dict[str, Any], result: Any) -> None:
    """Remember which tokens a cache was made of, where `generate` tells: one sequence for each of its rows."""
    fields = result if isinstance(result, dict) else {}
    sequences = fields.get("sequences", result)
    cache = cache_in(fields)
    cache = cache_in(given) if cache is None else cache
    length, store = length_of(cache), _first_store(cache)
    searches = (Asked(model, given)("num_beams") or 1) > 1  # beams were picked: the sequences are not the cache's rows
    if store is None or not is_tokens(sequences) or searches:
        return
    rows, columns = sequences.shape
    if length <= columns and rows == len(store.state.cursor):
        _SAID[store] = Said(sequences[:, :length].detach().clone(), store.calls)


def _first_store(cache: Any) -> SlotStore | None:
    return next((store for one in tensors(cache) if (store := find(one.tensor)) is not None), None)
