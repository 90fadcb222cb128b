"""What calls of a model change in the model itself: caches and counters in attributes.

A compiled model and the one it was made from are the same modules, but not the same conversation: what a call of the
compiled one changes in attributes is put back after the call, and put in again before the next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.runtime.store import version

DEEPEST = 4
"""Steps from an attribute to what it holds: containers in objects in lists."""

_MISSING = object()
WHOLE = "whole"
"""That an attribute holds something else altogether."""
_INTERNAL = frozenset(vars(torch.nn.Module())) - {"_buffers"} | {"_compiled_call_impl", "_forward_hooks_with_kwargs"}
Key = tuple[int, str]


class Snapshot:
    """Every attribute of the modules in a tree, buffers among them, and the contents of what can change in place."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self.values: dict[Key, tuple[dict[str, Any], str, Any]] = _attributes(root)
        self.versions = {k: version(v) for k, (_, _, v) in self.values.items() if isinstance(v, torch.Tensor)}
        self.contents: dict[int, tuple[Any, Any]] = {}
        self.parts: dict[int, list[Any]] = {}
        for _, _, value in self.values.values():
            if id(value) not in self.parts:  # a model's configuration hangs on every module
                self.parts[id(value)] = _mutable(value)
                self.contents.update((id(part), (part, _content(part))) for part in self.parts[id(value)])

    def changed(self) -> dict[Key, set[Any]]:
        """Attributes that hold something else by now, or whose contents are others; and what is another in each."""
        now = _attributes(self.root)
        keys = [*self.values, *(key for key in now if key not in self.values)]
        return {key: found for key in keys if (found := self.items(key, now))}

    def moved(self) -> str:
        """Names of tensors that were written to in place since."""
        return ", ".join(key[1] for key, seen in self.versions.items() if version(self.values[key][2]) != seen)

    def note(self, holder: dict[str, Any], name: str) -> None:
        """Take an attribute's value of now as the one that it had."""
        if name in holder:
            value = holder[name]
            self.values[id(holder), name] = holder, name, value
            self.parts[id(value)] = _mutable(value)
            self.contents.update((id(part), (part, _content(part))) for part in self.parts[id(value)])

    def restore(self, keys: list[Key]) -> None:
        """Give attributes the values that they had, in place."""
        now = _attributes(self.root)
        for key in keys:
            holder, name, _ = self.values.get(key) or now[key]
            value = self.values[key][2] if key in self.values else _MISSING
            _put(holder, name, value)
            for part in self.parts.get(id(value), ()):
                _fill(part, self.contents[id(part)][1])

    def items(self, key: Key, now: dict[Key, tuple[dict[str, Any], str, Any]]) -> set[Any]:
        """What is another in an attribute: `WHOLE`, or items of containers and objects in it."""
        if key not in now or key not in self.values or now[key][2] is not self.values[key][2]:
            return {WHOLE}
        parts = [(id(part), self.contents[id(part)][1], _content(part)) for part in self.parts[id(now[key][2])]]
        return {(at, item) for at, old, new in parts for item in _other(old, new)}

    def are_settings(self, key: Key, items: set[Any]) -> bool:
        """Whether items of what an attribute held and holds are flags, names or nothing."""
        for part in self.parts[id(self.values[key][2])]:
            for content in (self.contents[id(part)][1], _content(part)):
                if isinstance(content, dict):
                    kept = [value for item, value in content.items() if (id(part), item) in items]
                else:
                    kept = [value for at, value in enumerate(content) if (id(part), at) in items]
                if not all(value is None or isinstance(value, (bool, str)) for value in kept):
                    return False
        return True


class HostState:
    """The compiled model's own values of the attributes that its calls change.

    Attributes:
        names: of those, and of attributes that were set on the compiled model between calls.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self.first: Snapshot | None = Snapshot(root)
        self.own: dict[Key, tuple[dict[str, Any], str, Any]] = {}
        self.names: set[str] = set()

    def get(self, holder: dict[str, Any], name: str, value: Any) -> Any:
        """The compiled model's value of an attribute, `value` if it has none of its own."""
        entry = self.own.get((id(holder), name)) if self.own else None
        return value if entry is None else entry[2]

    def set(self, holder: dict[str, Any], name: str, value: Any) -> bool:
        """Set the compiled model's own value; False if it has none."""
        key = id(holder), name
        if key not in self.own:
            return False
        self.own[key] = holder, name, value
        return True

    def given(self, holder: dict[str, Any], name: str) -> None:
        """An attribute was set on the compiled model itself: before its first call too, it is no other's doing."""
        if name in holder and isinstance(holder[name], (int, torch.Tensor)):
            self.names.add(name)
        if self.first is not None:
            self.first.note(holder, name)

    def changing(self, new: bool) -> Iterator[tuple[str, Any]]:
        """Name and value of the attributes that calls change. With `new`, also of those that no call has been seen to
        change, but which are not what they were at compile.
        """
        for holder, name, _ in self.own.values():
            if name in holder:
                yield name, holder[name]
        if new and self.first is not None:
            now = _attributes(self.root)
            yield from (now[key][1:] for key in self.first.changed() if key in now and key not in self.own)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The compiled model's values in place of the model's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def learn(self, before: Snapshot) -> list[Key]:
        """After a call: take what it changed as the compiled model's own, and put the model's values back. Returns the
        attributes that are new here and that somebody else had changed between compile and this call.
        """
        fresh = {key: items for key, items in before.changed().items() if key not in self.own}
        moved = before.moved()
        self._adopt(list(fresh))
        before.restore(list(fresh))
        alien = self._drifted(fresh)
        if alien and moved:
            raise CacheError(
                f"calls of the model itself changed its state after kvpass.compile, and this one {moved} in place",
                hint="call kvpass.compile again",
            )
        if alien:
            self._begin_again(alien)
        self.first = None
        return alien

    def disown(self) -> list[Key]:
        """After a failed first call: attributes in which calls of the model itself left tensors since compile. The
        compiled model gets the values that they had at compile.
        """
        now = _attributes(self.root)
        alien = [key for key in self._drifted({key: {WHOLE} for key in now}) if _holds_tensors(now, key)]
        if alien:
            self._begin_again(alien)
        self.first = None
        return alien

    def _drifted(self, items: Mapping[Key, Set[Any]]) -> list[Key]:
        """Attributes of which these items were others at compile than before this call. Flags and names in an object
        without a tensor are settings (a model's configuration), and no conversation's state.
        """
        if self.first is None:
            return []
        now, first, found = _attributes(self.root), self.first, []
        for key, mine in items.items():
            theirs = first.items(key, now) if key in now or key in first.values else set()
            whole = WHOLE in theirs or (theirs and WHOLE in mine)
            both = theirs & mine
            if whole or (both and (_holds_tensors(now, key) or not first.are_settings(key, both))):
                found.append(key)
        return found

    def _adopt(self, keys: list[Key]) -> None:
        now, memo = _attributes(self.root), dict[int, Any]()
        for key in keys:
            holder, name, value = now.get(key, (None, "", _MISSING))
            if holder is not None:
                self.names.add(name)
                self.own[key] = holder, name, _copied(value, memo)

    def _begin_again(self, keys: list[Key]) -> None:
        assert self.first is not None
        here = Snapshot(self.root)
        self.first.restore(keys)
        self._adopt(keys)
        here.restore(keys)

    def _swap(self) -> None:
        for key, (holder, name, value) in self.own.items():
            self.own[key] = holder, name, holder.get(name, _MISSING)
            _put(holder, name, value)


def _put(holder: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        holder.pop(name, None)
    else:
        holder[name] = value


def _attributes(root: torch.nn.Module) -> dict[Key, tuple[dict[str, Any], str, Any]]:
    found: dict[Key, tuple[dict[str, Any], str, Any]] = {}
    for module in root.modules():
        own = vars(module)
        for holder in (own, own.get("_buffers", {})):
            for name, value in holder.items():
                if holder is not own or (name not in _INTERNAL and name != "_buffers"):
                    found[id(holder), name] = holder, name, value
    return found


def _mutable(value: Any, depth: int = 0) -> list[Any]:
    """A value and what it holds, as far as it can change in place."""
    if depth > DEEPEST or isinstance(value, (torch.nn.Module, torch.Tensor, type)) or callable(value):
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    else:
        return []
    inner = [x for part in parts for x in _mutable(part, depth + 1)]
    return inner if isinstance(value, tuple) else [value, *inner]


def _content(part: Any) -> Any:
    if isinstance(part, dict):
        return dict(part)
    return list(part) if isinstance(part, (list, set)) else dict(vars(part))


def _fill(part: Any, content: Any) -> None:
    if isinstance(part, list):
        part[:] = content
        return
    target = part if isinstance(part, (dict, set)) else vars(part)
    target.clear()
    target.update(content)


def _other(one: Any, other: Any) -> list[Any]:
    """Keys or places at which two contents differ; of lists of other lengths, all places."""
    if isinstance(one, dict):
        keys = {*one, *other}
        return [key for key in keys if one.get(key, _MISSING) is not other.get(key, _MISSING)]
    if len(one) != len(other):
        return [*range(max(len(one), len(other)))]
    return [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a is not b]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A value with containers and objects of its own around the same tensors and modules."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, tuple):
        parts = [_copied(part, memo) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if not _mutable(value):
        return value
    result = memo[id(value)] = copy.copy(value)
    content = _content(value)
    if isinstance(content, dict):
        _fill(result, {key: _copied(part, memo) for key, part in content.items()})
    else:
        _fill(result, [_copied(part, memo) for part in content])
    return result


def _holds_tensors(now: dict[Key, tuple[dict[str, Any], str, Any]], key: Key) -> bool:
    if key not in now:
        return False
    value = now[key][2]
    inside = [x for part in _mutable(value) for x in (part.values() if isinstance(part, dict) else _content(part))]
    return any(isinstance(x, torch.Tensor) for x in [value, *inside])
