"""What one outermost call of a compiled model did to caches: each that grew must be one that kvpass made.

Graphs note what they do in the record of the call that runs them; when it ends, the record is compared with what the
caller gave and got. Engines, wrappers and hosts may keep keys and values wherever they like: in HF caches, tuples,
objects, attributes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from kvpass.errors import DeclinedError, RecompileError, ShellDataError
from kvpass.runtime.active import ACTIVE, Ledger
from kvpass.runtime.attributes import DEEPEST, attributes
from kvpass.runtime.breaks import MEND, breaks, told
from kvpass.runtime.shell import find, is_shell, written
from kvpass.runtime.store import SlotStore
from kvpass.runtime.veil import Shell, unveil, veil

FEW = 16
"""New entries of a cache, up to which some may lie before the old ones and some behind."""

_NO_CACHES = frozenset({"logits", "hidden_states", "attentions", "last_hidden_state", "decoder_hidden_states",
                        "decoder_attentions", "cross_attentions", "encoder_hidden_states", "encoder_attentions",
                        "encoder_last_hidden_state", "image_hidden_states", "loss"})  # fmt: skip
"""Fields of a result that are no caches, however long they are."""

_LEAVES = (str, bytes, int, float, type, type(None), torch.dtype, torch.device, torch.nn.Module)
"""Nothing in them is a cache."""

_PLAIN, _PAIR = (torch.Tensor, Shell), ("keys", "values")

Path = tuple[Any, ...]


class Found(NamedTuple):
    """A tensor on the way from a call's arguments or result.

    Attributes:
        holder: the object or the container that it is in.
    """

    path: Path
    tensor: torch.Tensor
    holder: Any = None

    @property
    def pair(self) -> bool:
        """Whether it is of the `keys` and `values` of a cache that grows."""
        return bool(self.path) and self.path[-1] in _PAIR and _holds_pair(self.holder)

    @property
    def name(self) -> str:
        parts = [f"[{at}]" if isinstance(at, int) else f".{at}" for at in self.path]
        return "".join(parts).lstrip(".") or "the result"


@dataclass
class Call(Ledger):
    """One outermost call, and the tensors that it was given.

    Attributes:
        kept: tensors in the model's attributes before the call, of those attributes that calls change.
        buffered: stores of earlier calls that buffers of the caller's stand for, as they were left.
        spoke: shells that were given, or that the model itself held.
        own: ids of what is no dense cache, or one by choice, once the call is over; `reached`: of those of them that
            the caller can reach then.
    """

    given: list[Found] = field(default_factory=list)
    kept: list[Found] = field(default_factory=list)
    buffered: list[tuple[SlotStore, int]] = field(default_factory=list)
    spoke: list[torch.Tensor] = field(default_factory=list)
    shells: list[tuple[Path, SlotStore]] = field(default_factory=list)
    own: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)

    def begin(self, args: Any, kwargs: Any, kept: list[Found]) -> None:
        """Take stock of the arguments; shells among them become plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():  # shells tell their sizes at once
            self.given, self.kept = tensors((args, kwargs)), kept
        shells = [one for one in self.given if type(one.tensor) is Shell]
        hosted = [t for t in (ref() for ref in self.hosted) if t is not None]
        self.made += [one.tensor for one in shells] + hosted
        self.spoke = [t for t in self.made if type(t) is Shell]
        unveil(self.spoke)
        self.shells = [(one.path, store) for one in shells if (store := find(one.tensor)) is not None]
        self.breaks = len(breaks())
        halves = [(store, half) for store in self.owner.stores for half in (0, 1) if store.held[half] is not None]
        self.buffered = [(store, half) for store, half in halves if written(store, half) is None]
        ACTIVE.calls.append(self)

    def end(self) -> None:
        """Make shells speak again."""
        ACTIVE.calls.remove(self)
        self.owner.stores.update(store for store in self.opened if store.held != [None, None])
        veil(self.spoke)
        veil([t for t in self.made if type(t) is torch.Tensor and is_shell(t)])

    def compare(self, args: Any, kwargs: Any, result: Any, kept: list[Found]) -> list[Found]:
        """Compare what the call left with what its graphs noted. Returns what it left that is not `own`. kept: what is
        in the model's attributes now.

        Raises:
            RecompileError: Dynamo ran no graph, and a compressed cache was given.
            ShellDataError: a part of the model that ran uncompiled took a compressed cache as data.
            DeclinedError: strict, and a cache grew that is not kvpass' own.
        """
        self._check_buffers()
        self.own = {*map(id, self.made), *map(id, self.dense)}
        walk = _walk(args, kwargs, result, self.own)
        self.reached, after = walk.reached, walk.found
        self._check_shells(args, kwargs, result)
        if self.owner.backend.strict:
            grown = [one for one in after if self._grew(one)] + [one for one in kept if self._grew_inside(one)]
            if grown:
                raise self._dense(grown)
        return after

    def _check_buffers(self) -> None:
        """A buffer that stands for a store is never written: only the model as it is would do that, and read it too."""
        store = next((store for store, half in self.buffered if written(store, half) is not None), None)
        if store is not None:
            broken = told(self.breaks)
            raise ShellDataError(
                f"a part of the model ran uncompiled, and wrote into and read the buffer in the place of the "
                f"compressed cache of {store.name}: what it gave is worthless",
                where=broken or "no graph of this call continued that cache",
                hint=f"{MEND}; begin again at position 0",
            )

    def _check_shells(self, args: Any, kwargs: Any, result: Any) -> None:
        if self.shells and not self.graphs:
            raise RecompileError(
                "Dynamo ran the model uncompiled, and it read a compressed cache as data: what it gave is worthless",
                where=f"a call with a cache of {self.shells[0][1].name}",
                hint="look for torch._dynamo.disable, torch.compiler.set_stance or a skipped file around the model; "
                "begin again from an empty cache",
            )
        continued = {id(store) for store in self.opened}
        others = [(path, store) for path, store in self.shells if id(store) not in continued]
        now = {one.path: one.tensor for one in _walk(args, kwargs, result).found} if others else {}
        for path, store in others:
            left = now.get(path)
            if left is not None and find(left) is None:
                raise ShellDataError(
                    f"a part of the model ran uncompiled and read the compressed cache of {store.name} as data",
                    where=Found(path, left).name,
                    hint="look for torch._dynamo.disable or a graph break there; begin again from an empty cache",
                )

    def _grew(self, one: Found) -> bool:
        """Is this a cache that is longer than before, or was not there?"""
        if not self._may_be_dense(one, self.given) or not _NO_CACHES.isdisjoint(one.path[:2]):
            return False
        return one.pair or any(_longer(old.tensor, one.tensor) for old in self.given)

    def _grew_inside(self, one: Found) -> bool:
        """Of a tensor in the model's attributes: a model may keep there what it likes, so only what continues an older
        tensor is a cache, or anything where nothing at all was compiled.
        """
        if not self._may_be_dense(one, self.kept):
            return False
        return not self.graphs or any(_longer(old.tensor, one.tensor) for old in self.kept)

    def _may_be_dense(self, one: Found, before: list[Found]) -> bool:
        t = one.tensor
        if id(t) in self.own or t.dim() < 3 or not t.is_floating_point() or not t.numel() or find(t) is not None:
            return False
        return not any(old.tensor is t for old in before)

    def _dense(self, grown: list[Found]) -> DeclinedError:
        names = ", ".join(dict.fromkeys(one.name for one in grown[:4]))
        more = f" and {len(grown) - 4} more" if len(grown) > 4 else ""
        how = "no graph with an attention that kvpass knows wrote them"
        if not self.graphs:
            how = "Dynamo compiled no part of this call"
        broken = told(self.breaks)
        return DeclinedError(
            f"a cache grew that kvpass did not compress: {names}{more} ({list(grown[0].tensor.shape)}); {how}",
            where=f"a call of {self.owner}" + (f"; {broken}" if broken else ""),
            hint=(f"{MEND}; " if broken else "")
            + "kvpass.explain(model, ...) shows what was traced, TORCH_LOGS=graph_breaks what was not; strict=False "
            "leaves such caches dense",
        )


def _longer(old: torch.Tensor, new: torch.Tensor) -> bool:
    """The same sizes but for one axis, along which it grew from two entries or more, and the old entries are in it: a
    layer that widens its input gives the same sizes.
    """
    if old.dim() != new.dim() or old.dtype != new.dtype or old.device != new.device:
        return False
    axes = [axis for axis in range(old.dim()) if old.shape[axis] != new.shape[axis]]
    if len(axes) != 1 or not 1 < old.shape[axes[0]] < new.shape[axes[0]]:
        return False
    store = find(old)
    if store is not None:  # logits may have a buffer's sizes but for its entries
        return any(len(layout.axes) != old.dim() or layout.token_axis == axes[0] for layout in store.layouts)
    size, more = old.shape[axes[0]], new.shape[axes[0]] - old.shape[axes[0]]
    starts = range(more + 1) if more <= FEW else (0, more)
    return any(_equal(old, new.narrow(axes[0], start, size)) for start in starts)


def _equal(old: torch.Tensor, part: torch.Tensor) -> bool:
    with torch.no_grad():
        return bool(((old == part) | (old.isnan() & part.isnan())).all())


def tensors(value: Any, path: Path = ()) -> list[Found]:
    """Tensors in arguments or results: in containers and objects, but not in modules."""
    walk = _Walk()
    walk.into(value, path)
    return walk.found


def _walk(args: Any, kwargs: Any, result: Any, own: Collection[int] = ()) -> _Walk:
    """Through what a call was given, and gave. A cache that is in both is looked through once, by the name under which
    it was given.
    """
    walk = _Walk(own)
    walk.into((args, kwargs), ())
    walk.into(result, ())
    return walk


class _Walk:
    """A way through containers and objects. Each call of a compiled model goes two: what is in them is asked for by
    class, and of what is known already only the id is noted.

    Attributes:
        found: tensors, but those of `own`.
        reached: ids of those of `own`.
    """

    def __init__(self, own: Collection[int] = ()) -> None:
        self.own, self.found, self.reached = own, list[Found](), set[int]()
        self.seen: set[int] = set()

    def into(self, value: Any, path: Path) -> None:
        kind = _kind(type(value))  # type: ignore[arg-type]  # mypy takes no class for hashable
        if kind == "tensor":
            self._meet(Found(path, value))
        elif kind != "leaf":
            self._through(value, kind, path)

    def _through(self, value: Any, kind: str, path: Path) -> None:
        if len(path) > DEEPEST or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if kind == "list":
            parts: dict[Any, Any] = dict(enumerate(value))
        else:
            parts = value if kind == "dict" else attributes(value)
        for key, part in parts.items():
            kind = _kind(type(part))  # type: ignore[arg-type]  # as above
            if kind == "tensor":
                if id(part) in self.own:
                    self.reached.add(id(part))
                else:
                    self._meet(Found((*path, key), part, value))
            elif kind != "leaf":
                self._through(part, kind, (*path, key))

    def _meet(self, one: Found) -> None:
        if id(one.tensor) in self.own:
            self.reached.add(id(one.tensor))
        elif type(one.tensor) in _PLAIN or not isinstance(one.tensor, torch.nn.Parameter) or one.pair:
            self.found.append(one)


@lru_cache(maxsize=1024)
def _kind(cls: Any) -> str:
    """What objects of a class are on the way: `leaf`, `tensor`, `list`, `dict` or `object`."""
    if issubclass(cls, torch.Tensor):
        return "tensor"
    if issubclass(cls, _LEAVES):
        return "leaf"
    if issubclass(cls, (list, tuple)):
        return "list"
    return "dict" if issubclass(cls, dict) else "object"


def _holds_pair(value: Any) -> bool:
    parts = value if isinstance(value, dict) else attributes(value)
    keys, values = parts.get("keys"), parts.get("values")
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
        return False
    return keys.shape[:-1] == values.shape[:-1] and not parts.get("is_sliding", getattr(value, "is_sliding", False))
