"""All tensors of a cache object: which stand for stores, which hold keys, values or states themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpass.runtime.attributes import DEEPEST, attributes
from kvpass.runtime.identity import Origin
from kvpass.runtime.left import FEWEST_AXES, left_by
from kvpass.runtime.shell import attached, find, is_shell
from kvpass.runtime.store import SlotStore
from kvpass.runtime.wrapped import Wrapped

NO_CACHES = {*vars(torch.nn.Module()), "kvpass", "_compiled_call_impl"}
"""Attributes of a module that hold weights, hooks, and the records of compiled graphs."""

CACHE_FIELDS = ("cache", "past_key_values")
"""Where a model's output keeps its cache, beside logits and hidden states."""


@dataclass(frozen=True)
class Part:
    """A tensor and the way to it.

    Attributes:
        group: the module's attribute through which it is reached; "" outside of modules.
    """

    path: str
    tensor: torch.Tensor
    group: str = ""

    @property
    def place(self) -> str:
        """What it is a part of: `layers[3]` of `layers[3].keys`, `[2]` of `[2][0]`."""
        cut = max(self.path.rfind("."), self.path.rfind("["))
        return (self.path[:cut] or self.path).lstrip(".")

    @property
    def storage(self) -> int:
        return int(self.tensor.untyped_storage()._cdata)

    @property
    def bytes(self) -> int:
        """Of its whole memory: a slice keeps what it was cut from."""
        return self.tensor.untyped_storage().nbytes()


@dataclass
class Holdings:
    """What a cache object holds. No memory is in it twice.

    Attributes:
        stores: by layer.
        buffers: of the caller's, which stand for stores.
        dense: keys, values and states that are no store's.
        left: who saw a cache in which nothing was compressed.
    """

    stores: list[SlotStore] = field(default_factory=list)
    buffers: list[Part] = field(default_factory=list)
    dense: list[Part] = field(default_factory=list)
    left: Origin | None = None

    @property
    def states(self) -> list[SlotStore]:
        """One store for each state: forks share theirs until one of them changes it."""
        return list({id(store.state): store for store in self.stores}.values())

    @property
    def bytes(self) -> int:
        """Of all keys, values and states, each memory once."""
        own, others = self.states, (*self.buffers, *self.dense)
        return sum(store.bytes for store in own) + sum(part.bytes for part in others)


def stores(cache: Any) -> list[SlotStore]:
    """Every store that rides in a cache object: HF caches, nested tuples, lists and dicts, or modules with cache
    attributes.
    """
    return _stores(list(tensors_in(cache)))


def holdings(cache: Any) -> Holdings:
    """Everything that a cache object holds. Of a module only what looks like the stores' keys and values counts, or
    lies beside them in one object: its other buffers are no cache.
    """
    parts = list(tensors_in(cache))
    found = Holdings(_stores(parts))
    with_shells = {part.group for part in parts if find(part.tensor) is not None}
    known: set[int] = _weights(cache)
    for part in parts:
        tensor = part.tensor
        counts = tensor.dim() and part.bytes and not isinstance(tensor, torch.nn.Parameter)
        if not counts or part.storage in known:
            continue
        stands = attached(tensor)
        if is_shell(tensor):
            continue
        beside = part.group in with_shells and tensor.dim() >= FEWEST_AXES
        if stands or not part.group or beside or _looks_cached(tensor, found.stores):
            known.add(part.storage)
            (found.buffers if stands else found.dense).append(part)
    if not found.stores:
        found.left = next(filter(None, (left_by(part.tensor) for part in parts)), None)
    return found


def _stores(parts: list[Part]) -> list[SlotStore]:
    found: dict[int, SlotStore] = {}
    for part in parts:
        for store in (find(part.tensor), *attached(part.tensor)):
            if store is not None:
                found.setdefault(id(store), store)
    return sorted(found.values(), key=lambda s: s.layer)


def _weights(cache: Any) -> set[int]:
    """Storages of a module's parameters, of which other attributes may be views."""
    own = cache.parameters() if isinstance(cache, torch.nn.Module) else ()
    return {int(parameter.untyped_storage()._cdata) for parameter in own}


def _looks_cached(tensor: torch.Tensor, stores: list[SlotStore]) -> bool:
    """Is a tensor of a module made like the keys or values of its stores? A table of angles, [1, 1, T, D], is, where
    there are one sequence and one head, but for its length.
    """
    if not tensor.is_floating_point() or tensor.dim() < FEWEST_AXES:
        return False
    return left_by(tensor) is not None or any(
        _is_like(tuple(tensor.shape), store, half) for store in stores for half in (0, 1)
    )


def _is_like(shape: tuple[int, ...], store: SlotStore, half: int) -> bool:
    batch, heads, _, dim = (store.state.k, store.state.v)[half].shape
    heads, dim = (heads, dim) if store.host is None else store.host[half]
    lengths = (store.tokens, store.length)
    if len(shape) == 3:
        flat = (batch, heads * dim), (batch * heads, dim)
        return (shape[0], shape[2]) in flat and shape[1] in lengths
    (b, *middle, d) = shape[-4:]
    if (b, d) != (batch, dim) or heads not in middle:
        return False
    return batch * heads > 1 or any(length in middle for length in lengths)


def tensors_in(cache: Any) -> Iterator[Part]:
    """Tensors in an object, nearest first; modules in modules are one step, however deep they lie."""
    seen: set[int] = set()
    level: list[tuple[str, str, Any]] = [("", "", cache_of(cache))]
    for _ in range(DEEPEST + 1):
        below: list[tuple[str, str, Any]] = []
        for path, group, value in level:
            if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
                continue
            seen.add(id(value))
            if hasattr(value, "__tensor_flatten__"):
                below += [(f"{path}.{name}", group, getattr(value, name)) for name in value.__tensor_flatten__()[0]]
            elif isinstance(value, torch.Tensor):
                yield Part(path, value, group)
            elif isinstance(value, torch.nn.Module):
                below += [(path + at, path + at, one) for at, one in _of_module(value)]
            else:
                below += [(path + at, group, one) for at, one in _entries(value)]
        level = below


def cache_of(value: Any) -> Any:
    """The cache of a model's output, or of a wrapper; another value itself."""
    if isinstance(value, Wrapped):
        return value.host
    if isinstance(value, Mapping):
        return next((value[name] for name in CACHE_FIELDS if value.get(name) is not None), value)
    if not isinstance(value, tuple) or any(find(one) is not None for one in value):
        return value
    inner = [one for one in value if not isinstance(one, torch.Tensor) and next(tensors_in(one), None) is not None]
    return inner if len(inner) < len(value) and inner else value  # (logits, cache)


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", one) for key, one in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{at}]", one) for at, one in enumerate(value)]
    return [(f".{name}", one) for name, one in attributes(value).items()]


def _of_module(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """Buffers and plain attributes of a module and of those in it."""
    ours = hasattr(type(module), "_kvpass_attributes")  # then buffers are among them, as the compiled model has them
    found: list[tuple[str, Any]] = [] if ours else [(f".{name}", buffer) for name, buffer in module.named_buffers()]
    for path, inner in module.named_modules():
        prefix = f".{path}" if path else ""
        own = inner._kvpass_attributes() if hasattr(type(inner), "_kvpass_attributes") else vars(inner)
        found += [(f"{prefix}.{name}", one) for name, one in own.items() if name not in NO_CACHES]
    return found
