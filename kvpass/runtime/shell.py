"""Shells: tensors of the cache's logical shape over next to no memory, all NaN, which carry the store in the host's own
cache object.

The host sees lengths (it derives positions and masks from them) but no data. The store rides on the tensor as an
attribute, so it lives, is deep-copied and dies with the host's cache. A view of a shell loses the attribute and is
found again by its storage; what buffers of the caller's stand for is found by their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch

from kvpass.errors import ShellDataError, StaleCacheError
from kvpass.runtime.branches import MADE, SHELL
from kvpass.runtime.memory import Stands, overlapping, stand, standing_of, stands
from kvpass.runtime.pick import still_tentative, take_back
from kvpass.runtime.refusals import not_ours, read_as_data, swapped, taken_back
from kvpass.runtime.store import SlotStore, same_storage, sharing_storage, version
from kvpass.terms import Layout


def make(store: SlotStore, half: int) -> torch.Tensor:
    """The shell of a store's keys (half 0) or values (half 1), `[B, Hkv, T, D]` in the host's axis order."""
    layout, known = store.layouts[half], store.sizes[half]
    if known is None or known[0] is not layout:
        known = store.sizes[half] = layout, sizes_of(store, half, layout)
    sizes = known[1]
    if store.length is None:
        sizes[layout.token_axis] = store.tokens
        shell = store.bases[half].expand(*sizes)
        # it changes from step to step: unmarked, Dynamo compiles a step of this one length first
        torch._dynamo.maybe_mark_dynamic(shell, layout.token_axis)
    else:  # later calls write into it, which even a fake of it allows only where no step is 0
        shell = store.base_of(half, sum(sizes) - len(sizes) + 1).as_strided(sizes, [1] * len(sizes))
    setattr(shell, SHELL, (store, half))
    if store.cuts is not None:
        setattr(shell, MADE, store.cuts.count)
    store.versions[half] = version(shell)
    store.shown[half] = ref(shell), store.tokens
    return shell


def find(tensor: Any) -> SlotStore | None:
    """The store of a shell, of a view of one, or of a buffer; None for any other tensor."""
    if not isinstance(tensor, torch.Tensor):
        return None
    shell = getattr(tensor, SHELL, None)
    if shell is not None:
        found: SlotStore = shell[0]
        return found
    lies = overlapping(tensor)
    return lies[0][0] if lies else sharing_storage(tensor)


def half_of(shell: torch.Tensor) -> int | None:
    """0 for a shell of keys or a view of one, 1 for values; None for others."""
    store = find(shell)
    same = [half for half in (0, 1) if store is not None and same_storage(shell, store.bases[half])]
    return same[0] if same else None


def attach(tensor: torch.Tensor, path: tuple[int, ...], store: SlotStore, half: int) -> None:
    """Let a buffer, or one of several stacked in it, stand for a store's keys (half 0) or values (half 1)."""
    if same_storage(tensor, store.bases[half]):  # a shell, that stands for it already: its memory is the store's own
        setattr(tensor, SHELL, (store, half))
    else:
        forget(tensor)
        stand(tensor, path, store, half)
        store.held[half] = ref(tensor if tensor._base is None else tensor._base)
    store.versions[half] = version(tensor)


def attached(tensor: torch.Tensor) -> list[SlotStore]:
    """The stores that a shell or a buffer, or parts of it, stand for."""
    shell = getattr(tensor, SHELL, None)
    return [shell[0]] if shell is not None else [store for store, _ in overlapping(tensor)]


def written(store: SlotStore, half: int) -> torch.Tensor | None:
    """The memory of a buffer that stands for a store, if anybody has written to it since the store's last call."""
    held = store.held[half]
    tensor = held() if held is not None else None
    if tensor is None or store.versions[half] is None or store.versions[half] == version(tensor):
        return None
    found = standing_of(tensor)
    still = found is not None and any(one is store for one, _ in found.places.values())
    return tensor if still else None


def forget(tensor: torch.Tensor) -> None:
    """Of a shell that becomes a tensor of its host's again."""
    vars(tensor).pop(SHELL, None)


def is_shell(tensor: torch.Tensor) -> bool:
    """A shell of a store, or a view of one: its memory is the store's own."""
    return hasattr(tensor, SHELL) or sharing_storage(tensor) is not None


def of_shell(tensor: torch.Tensor, where: str) -> tuple[SlotStore, int]:
    """The store and the half that a whole shell stands for, as the last call left both.

    Raises:
        StaleCacheError: it is a view of a shell, of an earlier length, or a call on it failed.
    """
    found: tuple[SlotStore, int] | None = vars(tensor).get(SHELL)
    if found is not None:
        store, half = found
        _check_left_alone(store, [tensor], where, half)
        if list(tensor.shape) == sizes_of(store, half, store.layouts[half]):
            return found
    raise StaleCacheError(
        "this is not the newest state of a compressed cache: it was cropped, or another branch has gone on with it",
        where=where,
        hint="take the cache object that the last call returned",
    )


def is_data(tensor: torch.Tensor, path: tuple[int, ...] = ()) -> bool:
    """Keys or values that kvpass had no part in, not even as what was read out of a shell."""
    if find(tensor) is not None and (not path or overlapping(tensor, path)):
        return False
    return not _read_of_shell(tensor)


def _read_of_shell(key: torch.Tensor) -> bool:
    return key.is_floating_point() and bool(key.numel()) and bool(key[(0,) * key.dim()].isnan())


def _stands_for(tensor: torch.Tensor, path: tuple[int, ...]) -> Stands | None:
    """What a buffer, or one of several stacked in it, stands for, if the last call was given the same memory."""
    shell: Stands | None = getattr(tensor, SHELL, None) or stands(tensor, path)
    store = sharing_storage(tensor) if shell is None and not path else None
    if store is None or store.length is None:
        return shell
    seen = tuple(sizes_of(store, 0, store.layouts[0])), tuple(sizes_of(store, 1, store.layouts[1]))
    same = [h for h in (0, 1) if same_storage(tensor, store.bases[h]) and seen[h] == tuple(tensor.shape)]
    return (store, same[0]) if same and not tensor.storage_offset() and set(tensor.stride()) == {1} else None


def of_buffer(
    buffers: tuple[torch.Tensor, ...],
    paths: tuple[tuple[int, ...], ...],
    position: int,
    where: str,
) -> SlotStore:
    """The store that a call continues by writing at `position` of the keys' and the values' buffers.

    Raises:
        ForeignCacheError: the buffers hold tokens that kvpass did not see.
        StaleCacheError: the write does not continue what the store has seen, or somebody else wrote in between.
    """
    found: list[Any] = [_stands_for(t, path) for t, path in zip(buffers, paths, strict=True)]
    for buffer, path, standing in zip(buffers, paths, found, strict=True):
        if standing is None or standing[0] is not found[0][0]:
            raise _other_part(buffer, path, where) if standing is None else _foreign(buffer, where)
    if [half for _, half in found] != [*range(len(buffers))]:
        raise swapped(where)
    store: SlotStore = found[0][0]
    _check_left_alone(store, buffers, where)
    if store.tokens != position and not (position < store.tokens and take_back(store.owned(), position)):
        raise StaleCacheError(
            f"new tokens are written at {position}, but the cache has seen {store.tokens}",
            where=where,
            hint=f"go on where the last call ended, or begin again at 0; {still_tentative(store)}",
        )
    return store


def unwrap(past: tuple[torch.Tensor, ...], layouts: tuple[Layout, ...], where: str) -> SlotStore:
    """The store behind the K and V of a past, or behind the tensor that both are parts of, checked.

    Raises:
        ForeignCacheError: real keys that kvpass did not make.
        ShellDataError: data copied out of a shell.
        StaleCacheError: the cache was cropped, advanced by another branch or changed; or sequences were picked from it.
    """
    key, store = past[0], find(past[0])
    if store is not None and store.layouts[: len(past)] == layouts and _newest(store, past):
        _check_left_alone(store, past, where)
        return store
    if store is None or find(past[-1]) is not store:
        raise _foreign(key if store is None else past[-1], where)
    if not all(same_storage(t, base) for t, base in zip(past, store.bases, strict=False)):
        raise swapped(where)
    _check_left_alone(store, past, where)
    length = key.shape[layouts[0].token_axis]
    if store.cuts is not None and not all(store.cuts.spare(t, length) for t in past):
        raise taken_back(where)
    if length != store.tokens and not (length < store.tokens and take_back(store.owned(), length)):
        hint = f"{still_tentative(store)}; or keep a copy.deepcopy(cache) from before"
        if length > store.tokens or hasattr(key, SHELL):
            hint = "continue from the newest cache, or branch with copy.deepcopy(cache) before generating"
        raise StaleCacheError(
            f"the cache is {length} tokens long, but its state has seen {store.tokens}", where=where, hint=hint
        )
    for half, layout in enumerate(layouts):
        if tuple(past[half].shape) != tuple(sizes_of(store, half, layout)):
            raise StaleCacheError(
                f"the cache is {list(past[half].shape)}, but its state is of {sizes_of(store, half, layout)}",
                where=where,
                hint="pick whole sequences, keys[rows] and values[rows], or with kvpass.Cache(cache).select(rows)",
            )
    return store


def follow(tensor: torch.Tensor) -> None:
    """Let a store follow a shell that its host has cropped since the last call, as the next call would."""
    half = None if hasattr(tensor, SHELL) else half_of(tensor)
    store = sharing_storage(tensor) if half is not None else None
    if store is None or half is None or store.length is not None or tensor.dim() != len(store.layouts[half].axes):
        return
    length = tensor.shape[store.layouts[half].token_axis]
    if length < store.tokens and (store.cuts is None or store.cuts.spare(tensor, length)):
        take_back(store.owned(), length)


def _newest(store: SlotStore, past: tuple[torch.Tensor, ...]) -> bool:
    """Whether a past is the very shells that the last call left, of what the store is now: the usual case."""
    for seen, tensor in zip(store.shown, past, strict=False):
        if seen is None or seen[0]() is not tensor or seen[1] != store.tokens:
            return False
    return True


def sizes_of(store: SlotStore, half: int, layout: Layout) -> list[int]:
    """Logical shape of a store's keys or values in the host's axis order."""
    batch, heads, _, dim = (store.state.k, store.state.v)[half].shape
    heads, dim = (heads, dim) if store.host is None else store.host[half]
    sizes = {"B": batch, "H": heads, "T": store.tokens if store.length is None else store.length, "D": dim}
    return [sizes[axis] if isinstance(axis, str) else axis for axis in layout.axes]


def _check_left_alone(store: SlotStore, tensors: Sequence[torch.Tensor], where: str, first: int = 0) -> None:
    """Refuse a store that is no longer what its tokens say. The tensors are of both halves, or from `first` on."""
    if store.spoiled:
        raise StaleCacheError(
            "an earlier call on this cache failed halfway: some layers may hold its tokens, others not",
            where=where,
            hint="begin again from an empty cache; a copy.deepcopy(cache) from before that call is good too",
        )
    for seen, tensor in zip(store.versions[first:], tensors, strict=False):
        if seen is not None and seen != version(tensor):
            raise StaleCacheError(
                "the cache was written to between two calls, which changes nothing in its compressed state",
                where=where,
                hint="clear a cache by beginning again at position 0; keep it with copy.deepcopy(cache); "
                "keys from elsewhere cannot be loaded into it",
            )


def _other_part(buffer: torch.Tensor, path: tuple[int, ...], where: str) -> Exception:
    """Why no store was found: a part of the memory stands for one, but in another cut, or none does."""
    lies = overlapping(buffer, path)
    if not lies:
        return _foreign(buffer, where)
    sizes = list(buffer.shape[len(path) :])
    return StaleCacheError(
        f"the buffer {sizes} is another part of the memory in which the cache of {lies[0][0].name} lies",
        where=where,
        hint="give each call the same part of it (the same offset, sizes and strides), or begin again at position 0",
    )


def _foreign(key: torch.Tensor, where: str) -> Exception:
    return read_as_data(where) if _read_of_shell(key) else not_ours(where)


def refuse(args: Sequence[Any], watched: Sequence[int], where: str) -> None:
    """Refuse shells where a graph reads its inputs as data: NaN must not flow on.

    Raises:
        ShellDataError: one of the watched inputs is a shell.
    """
    for at in watched:
        store = find(args[at])
        if store is not None:
            raise ShellDataError(
                f"a part of the model that kvpass left as it is reads the compressed cache of {store.name} as data",
                where=where or store.name,
                hint="only attention that kvpass rewrites can read it; kvpass.explain(model, ..) of a call with the "
                "same arguments and a cache of the model's own shows what is left, and why",
            )
