"""A host's cache again with other stores and tensors in it: a deep copy, in which shells and data are exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvpass.api.holdings import Part, stores, tensors_in
from kvpass.errors import CacheError
from kvpass.runtime.memory import stands
from kvpass.runtime.pick import with_rows
from kvpass.runtime.shell import attached, find, half_of, is_shell, make
from kvpass.runtime.store import SlotStore
from kvpass.runtime.trim import trimmed
from kvpass.runtime.veil import Shell, veil

KEPT_APART = "cross_attention_cache"
"""Where a host keeps keys of another sequence, which may be padded behind its tokens."""


def rehoused(host: Any, change: Callable[[SlotStore], SlotStore], data: Callable[[Part], torch.Tensor | None]) -> Any:
    """A deep copy of a host's cache, with other stores.

    Args:
        change: another store in the place of one.
        data: another tensor in the place of one that stands for no store; None: a copy of it.

    Raises:
        CacheError: several layers lie in one buffer.
    """
    made: dict[int, SlotStore] = {}
    memo: dict[int, Any] = {}
    for part in tensors_in(host):
        tensor = part.tensor
        standing = standing_for(part)
        if standing is None:
            other = None if isinstance(tensor, torch.nn.Parameter) else data(part)
            memo |= {} if other is None else {id(tensor): other}
            continue
        store, half = standing
        if id(store) not in made:
            made[id(store)] = change(store)
        memo[id(tensor)] = _shell(made[id(store)], half, tensor)
    return copy.deepcopy(host, memo)


def standing_for(part: Part) -> tuple[SlotStore, int] | None:
    """The store that a tensor stands for, and for which half.

    Raises:
        CacheError: it stands for several.
    """
    tensor = part.tensor
    store, half = find(tensor), half_of(tensor)
    if is_shell(tensor) and store is not None and half is not None:
        return store, half
    if not attached(tensor):
        return None
    exact = stands(tensor)
    if exact is None:
        raise CacheError(
            "several layers, or parts of them, lie in one buffer: its sequences cannot be parted",
            where=part.path.lstrip("."),
            hint="copy.deepcopy(cache) copies all of it; give each layer a buffer of its own for more",
        )
    return exact


def picked(host: Any, rows: torch.Tensor) -> Callable[[Part], torch.Tensor | None]:
    """For `rehoused`: these sequences (int64 [n]) of tensors that hold data of the host's sequences.

    Raises, when it is asked, CacheError: a tensor whose sequences are not known.
    """
    count = _rows(stores(host))

    def data(part: Part) -> torch.Tensor | None:
        if not _holds_rows(part.tensor):
            return None
        if part.tensor.shape[0] != count:
            raise _unknown(part)
        return part.tensor.index_select(0, rows.to(part.tensor.device))

    return data


def trimming(host: Any, rows: torch.Tensor, columns: int, data: Callable[[Part], torch.Tensor | None]) -> Any:
    """These sequences (int64 [n]) of a host's cache without its first `columns` columns, which are padding in all of
    them, and without slots that only others needed.

    Raises:
        CacheError: it is preallocated, something lies beside the compressed layers, or the host counts by itself.
    """

    def cut(store: SlotStore) -> SlotStore:
        if store.length is not None:
            raise _untrimmed("it is preallocated", store.name)
        return trimmed(with_rows(store, rows), columns)

    def none(part: Part) -> torch.Tensor | None:
        if _holds_rows(part.tensor):
            raise _untrimmed(f"a tensor of {list(part.tensor.shape)} lies beside its slots", part.path.lstrip("."))
        return data(part)

    tokens = max(store.tokens for store in stores(host)) - columns
    other = rehoused(host, cut, none)
    if not isinstance(other, (tuple, list, dict)):
        counted = getattr(other, "get_seq_length", None)
        if counted is None or int(counted()) != tokens:
            raise _untrimmed(f"a {type(host).__name__} may count its tokens otherwise than by its keys", "")
    return other


def beside(hosts: Sequence[Any]) -> Callable[[Part], torch.Tensor | None]:
    """For `rehoused` of the longest host: tensors that hold data of sequences, of all hosts; keys and values of shorter
    ones have zeros in front.

    Raises, when it is asked, CacheError: hosts whose tensors do not fit.
    """
    places = [{part.path: part for part in tensors_in(host)} for host in hosts]

    def data(part: Part) -> torch.Tensor | None:
        if not _holds_rows(part.tensor):
            return None
        found = [place.get(part.path) for place in places]
        parts = [one.tensor for one in found if one is not None and _holds_rows(one.tensor)]
        longest, keys = max((one.shape[-2] for one in parts), default=0), part.path.endswith((".keys", ".values"))
        if keys and KEPT_APART not in part.path and all(one.dim() == 4 for one in parts):
            parts = [torch.nn.functional.pad(one, (0, 0, longest - one.shape[-2], 0)) for one in parts]
        if len(parts) < len(hosts) or any(one.shape[1:] != part.tensor.shape[1:] for one in parts):
            raise _unknown(part)
        return torch.cat(parts)

    return data


def _shell(store: SlotStore, half: int, old: torch.Tensor) -> torch.Tensor:
    """Of another store, as the host had one: mute where it was."""
    shell = make(store, half)
    if type(old) is Shell:
        veil([shell])
    return shell


def _rows(found: Sequence[SlotStore]) -> int:
    """How many sequences a host's tensors are of, if these come first; -1 if they do not."""
    first = all(layout.batch_axis == 0 for store in found for layout in store.layouts)
    return len(found[0].state.cursor) if found and first else -1


def _holds_rows(tensor: torch.Tensor) -> bool:
    """Whether a tensor is data of sequences: no counter, and no flag."""
    return tensor.dim() > 1 and tensor.numel() > 0


def _untrimmed(why: str, where: str) -> CacheError:
    return CacheError(
        f"the cache cannot be trimmed: {why}",
        where=where,
        hint="leave `trim` out: the columns stay in its length and in masks, and hold no slot",
    )


def _unknown(part: Part) -> CacheError:
    return CacheError(
        f"a tensor of {list(part.tensor.shape)} lies beside the compressed layers, and its sequences are not known",
        where=part.path.lstrip("."),
        hint="rows can be picked and merged where all tensors of a cache have the sequences as their first axis, and "
        "equal sizes but for the length of keys and values",
    )
