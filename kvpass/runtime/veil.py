"""Shells that speak: between calls of a compiled model, whoever reads a compressed cache as data is told so at once.

A shell is a plain tensor inside a call, as Dynamo's guards want it, and a `Shell` outside: the same object, of another
class. Sizes, devices and views are answered, whole sequences can be picked and repeated; NaN never flows on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from kvpass.errors import CacheError, ShellDataError
from kvpass.runtime.branches import OF
from kvpass.runtime.rows_asked import COPIES, rows_copied, rows_seen

_ANSWERED = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "untyped_storage", "is_floating_point", "is_complex", "is_inference", "get_device", "data_ptr", "is_same_size",
    "type", "isnan", "isfinite", "isinf", "__len__", "__hash__", "register_hook", "is_shared", "is_pinned",
    "has_names", "_is_view", "is_conj", "is_neg", "__dlpack_device__", "result_type",
})  # fmt: skip
"""Operations that read no data, or only ask whether it is any."""

_VIEWS = frozenset({
    "__getitem__", "view", "view_as", "expand", "expand_as", "narrow", "detach", "alias", "slice", "transpose",
    "permute", "movedim", "swapaxes", "t", "squeeze", "unsqueeze", "flatten", "reshape", "unflatten", "select",
    "unbind", "chunk", "split",
})  # fmt: skip
"""Operations that give views, by which a shell's store is found again."""

_MOVES = frozenset({
    "to", "cpu", "cuda", "float", "half", "bfloat16", "double", "requires_grad_",
})  # fmt: skip
"""Operations that give the tensor itself if there is nothing to do."""

_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})

_REPLIES = {
    "index_select": "only whole sequences can be picked out of a compressed cache, along its first axis",
    "__getitem__": "only whole sequences can be picked out of a compressed cache: keys[rows], rows a list or a tensor",
    "repeat_interleave": "only whole sequences can be repeated: keys.repeat_interleave(n, dim=0)",
    "repeat": "only whole sequences can be repeated: keys.repeat(n, 1, 1, 1)",
    "tile": "only whole sequences can be repeated: keys.tile(n, 1, 1, 1)",
    "zero_": "begin with a new cache: this one grows by joining, zeros would stay in it as keys",
    "cat": "it was handed to a model that kvpass did not compile, or joined by hand; give it to the model that made it",
}


class Shell(torch.Tensor):
    """The keys or values of a compressed cache for whoever holds it: sizes, but no data."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        shells = list(_shells((args, kwargs or {})))
        if name == "__get__" and getattr(func, "__self__", None) is not None:
            attribute = func.__self__.__name__
            return _plainly(func, args, kwargs, shells, views=attribute in _VIEW_ATTRIBUTES)
        if name in COPIES or name == "__getitem__":
            rows = _rows_of(rows_copied, func, args, kwargs)
            if rows is not None:
                return _picked(args[0], rows)
            if name in COPIES:
                raise _refusal(name, shells[0])
        if name == "contiguous":  # nobody can tell
            return args[0]
        if name in _ANSWERED or name in _VIEWS or (name in _MOVES and _in_place(func, args, kwargs)):
            return _plainly(func, args, kwargs, shells, views=name in _VIEWS | _MOVES)
        if name == "zero_":
            return _emptied(args[0])
        if name == "__deepcopy__":
            return _deep_copy(*args)
        if name in ("__reduce_ex__", "__reduce__"):
            return _pickled(args[0])
        if name == "__repr__":
            return f"<keys or values of a compressed cache, {list(args[0].shape)}: kvpass.inspect(cache) shows them>"
        raise _refusal(name, shells[0])


def veil(tensors: Iterable[torch.Tensor]) -> None:
    """Make shells speak."""
    for tensor in tensors:
        if type(tensor) is torch.Tensor:
            tensor.__class__ = Shell


def unveil(tensors: Iterable[torch.Tensor]) -> None:
    """Make them plain tensors again, for a call that knows them."""
    for tensor in tensors:
        if type(tensor) is Shell:
            tensor.__class__ = torch.Tensor  # type: ignore[assignment]  # the same object, of another class


def _shells(value: Any) -> Iterable[torch.Tensor]:
    if type(value) is Shell:
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _shells(part)
    elif isinstance(value, dict):
        yield from _shells(list(value.values()))


def _plainly(func: Any, args: Any, kwargs: Any, shells: list[torch.Tensor], views: bool) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **(kwargs or {}))
        if views:
            parts = result if isinstance(result, (list, tuple)) else [result]
            homes = {shell.untyped_storage()._cdata for shell in shells}
            tensors = [t for t in parts if isinstance(t, torch.Tensor)]
            if any(t.untyped_storage()._cdata not in homes for t in tensors):  # picked or copied, so read
                raise _refusal(func.__name__, shells[0])
            veil(tensors)
            for tensor in tensors:
                setattr(tensor, OF, shells[0])
            if _loses_rows(shells[0], tensors):
                return _parts(func, args, kwargs, result)
    return result


def _loses_rows(shell: torch.Tensor, views: list[torch.Tensor]) -> bool:
    """Whether some of these views are a cache but for the number of its sequences."""
    from kvpass.runtime.shell import find, half_of

    store, half = find(shell), half_of(shell)
    if store is None or half is None or not any(view.dim() == shell.dim() for view in views):
        return False
    axis, token_axis = store.layouts[half].batch_axis, store.layouts[half].token_axis
    return any(
        view.dim() == shell.dim()
        and view.shape[axis] not in (0, shell.shape[axis])
        and all(view.shape[at] == shell.shape[at] for at in range(view.dim()) if at not in (axis, token_axis))
        for view in views
    )


def _parts(func: Any, args: Any, kwargs: Any, views: Any) -> Any:
    """Shells of the sequences that views of one show, in the place of those views of which it can be told."""
    found = _rows_of(rows_seen, func, args, kwargs)
    parts = list(views) if isinstance(views, (list, tuple)) else [views]
    for at, (part, rows) in enumerate(zip(parts, found or [None] * len(parts), strict=True)):
        if rows is not None and _loses_rows(args[0], [part]):
            parts[at] = _picked(args[0], rows, part)
    return type(views)(parts) if isinstance(views, (list, tuple)) else parts[0]


def _rows_of(ask: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What is found out of the rows of an operation on one shell, the first argument; None if it is no whole cache."""
    from kvpass.runtime.shell import find, half_of, sizes_of

    shell = args[0] if args and isinstance(args[0], Shell) else None
    store, half = find(shell), half_of(shell) if shell is not None else None
    if shell is None or store is None or half is None or len(list(_shells((args, kwargs or {})))) > 1:
        return None
    layout = store.layouts[half]
    whole = sizes_of(store, half, layout)
    if shell.dim() != len(whole) or any(shell.shape[at] != n for at, n in enumerate(whole) if at != layout.token_axis):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return ask(func, args, kwargs or {}, layout.batch_axis)


def _in_place(func: Any, args: Any, kwargs: Any) -> bool:
    """Would this give the same tensor? Asked of one element."""
    with torch._C.DisableTorchFunctionSubclass():
        one = args[0].as_strided((1,), (1,))
        return func(one, *args[1:], **(kwargs or {})) is one


def _deep_copy(shell: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    unveil([shell])
    try:
        result: torch.Tensor = copy.deepcopy(shell, memo)
    finally:
        veil([shell])
    veil([result])
    return result


def _emptied(shell: torch.Tensor) -> torch.Tensor:
    """The zeros of a preallocated buffer again, as `StaticCache.reset()` asks for: as large as it was."""
    from kvpass.runtime.shell import find, forget

    store = find(shell)
    if store is None or store.length is None:
        raise _refusal("zero_", shell)
    unveil([shell])
    vars(shell).pop(OF, None)
    forget(shell)
    with torch.inference_mode(False):
        shell.data = torch.zeros(shell.shape, dtype=shell.dtype, device=shell.device)
    return shell


def _picked(shell: torch.Tensor, rows: torch.Tensor, view: torch.Tensor | None = None) -> torch.Tensor:
    """The shell of the picked sequences, as beam search asks for; with as many tokens as a view of it has."""
    from kvpass.runtime.pick import selected
    from kvpass.runtime.shell import find, half_of, make

    store, half = find(shell), half_of(shell)
    assert store is not None
    assert half is not None
    axis, result = store.layouts[half].token_axis, make(selected(store, rows, half), half)
    tokens = (shell if view is None else view).shape[axis]
    if tokens != result.shape[axis]:
        whole, result = result, result.narrow(axis, 0, tokens)
        setattr(result, OF, whole)
    veil([result])
    return result


def _pickled(shell: torch.Tensor) -> Any:
    """How pickle makes it again."""
    from kvpass.runtime.pickled import packed

    return _unpickled, packed(shell)


def _unpickled(store: Any, half: int) -> torch.Tensor:
    from kvpass.runtime.shell import make
    from kvpass.runtime.store import SlotStore, unpicklable

    if not isinstance(store, SlotStore):  # copy.copy of a tensor asks how it is pickled, and makes it again at once
        raise unpicklable("a copy of one tensor of it")
    with torch.inference_mode(False):
        shell = make(store, half)
    veil([shell])
    return shell


def _refusal(name: str, shell: torch.Tensor) -> CacheError:
    from kvpass.runtime.shell import find

    store = find(shell)
    return ShellDataError(
        f"{name} reads a compressed cache as data; its keys and values are not in this tensor",
        where=store.name if store is not None else "",
        hint=_REPLIES.get(name, "") or "kvpass.inspect(cache) gives what is kept; copy a cache with copy.deepcopy",
    )
