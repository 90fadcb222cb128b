"""A host's cache object as plain data around its tensors, and the object again: what `Cache.save` writes beside slots.

Only containers, and objects of classes of transformers' own cache module, are written: to make another class's object
again would be to run whatever code a file names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.runtime.attributes import DEEPEST
from kvpass.runtime.shell import attached, is_shell, of_shell

HOME = "transformers.cache_utils"
"""The one module whose classes a file may name."""

_PLAIN = (type(None), bool, int, float, str)


class Telling:
    """Writes one host down.

    Attributes:
        stores, dense: stores, and tensors of the host's own, by the numbers that stand for them.
        hf: whether the host has objects of transformers.
    """

    def __init__(self) -> None:
        self.stores: list[Any] = []
        self.dense: list[torch.Tensor] = []
        self.hf = False

    def told(self, value: Any, path: str = "", depth: int = 0) -> Any:
        """The words for a value.

        Raises:
            CacheError: it cannot be made again from a file; named by its path.
        """
        if isinstance(value, _PLAIN):
            return value
        if depth > DEEPEST:
            raise _refused(value, path, "it lies too deep")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if type(value) in (list, tuple):
            parts = [self.told(one, f"{path}[{at}]", depth + 1) for at, one in enumerate(value)]
            return {type(value).__name__: parts}
        if type(value) is dict and all(isinstance(key, (int, str)) for key in value):
            return {"dict": [[key, self.told(one, f"{path}[{key!r}]", depth + 1)] for key, one in value.items()]}
        if isinstance(value, type) and _is_hf(value):
            self.hf = True
            return {"type": value.__name__}
        if _is_hf(type(value)):
            self.hf = True
            own = {name: self.told(one, f"{path}.{name}", depth + 1) for name, one in vars(value).items()}
            return {"object": type(value).__name__, "has": own}
        raise _refused(value, path, "a file can say tuples, lists, dicts and transformers' own caches")

    def _tensor(self, tensor: torch.Tensor, path: str) -> Any:
        if is_shell(tensor):
            store, half = of_shell(tensor, path)
            at = next((at for at, one in enumerate(self.stores) if one is store), len(self.stores))
            self.stores += [store] if at == len(self.stores) else []
            return {"shell": [at, half]}
        if attached(tensor):
            raise _refused(tensor, path, "buffers that you allocated are yours")
        if isinstance(tensor, torch.nn.Parameter):
            raise _refused(tensor, path, "weights are no part of a cache")
        at = next((at for at, one in enumerate(self.dense) if one is tensor), len(self.dense))
        self.dense += [tensor] if at == len(self.dense) else []
        return {"tensor": at}


def made(
    words: Any, shell: Callable[[int, int], Any], dense: Callable[[int], Any], device: Callable[[str], Any]
) -> Any:
    """The value that was told.

    Args:
        shell, dense: what stands for the words of a shell, and of a tensor of the host's own.
        device: where to put what was on a device, by its name.

    Raises:
        KeyError, TypeError, ValueError: these are no such words.
    """

    def again(one: Any) -> Any:
        return made(one, shell, dense, device)

    if isinstance(words, _PLAIN):
        return words
    kind, *rest = words
    said = words[kind]
    if kind == "shell":
        return shell(*said)
    if kind == "tensor":
        return dense(said)
    if kind == "device":
        return device(said)
    if kind == "dtype":
        found = getattr(torch, said)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{said} is no dtype")
        return found
    if kind in ("list", "tuple"):
        parts = [again(one) for one in said]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {key: again(one) for key, one in said}
    if kind == "type":
        return _class(said)
    if kind == "object" and rest == ["has"]:
        cls = _class(said)
        result = cls.__new__(cls)
        vars(result).update({str(name): again(one) for name, one in words["has"].items()})
        return result
    raise ValueError(f"{kind!r} is no word of a cache")


def shells_in(words: Any) -> Iterator[tuple[int, int]]:
    """Every shell that is told of."""
    if isinstance(words, dict) and "shell" in words:
        yield (words["shell"][0], words["shell"][1])
        return
    parts = words.values() if isinstance(words, dict) else words if isinstance(words, list) else ()
    for part in parts:
        yield from shells_in(part)


def _is_hf(cls: type) -> bool:
    return cls.__module__ == HOME


def _class(name: str) -> Any:
    found = getattr(import_module(HOME), name)
    if not (isinstance(found, type) and _is_hf(found)):
        raise ValueError(f"{name} is no class of {HOME}")
    return found


def _refused(value: Any, path: str, why: str) -> CacheError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return CacheError(
        f"a cache with a {kind} in it cannot be saved: {why}",
        where=path.lstrip(".") or "the cache itself",
        hint="give the model a DynamicCache or a tuple of pairs; copy.deepcopy(cache) keeps any cache in its process",
    )
