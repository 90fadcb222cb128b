"""What an object holds: its attributes, in slots and in a `__dict__`. Caches may be anyone's objects."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

DEEPEST = 12
"""Steps from an argument, a result or a cache to its tensors."""


def attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object by name, those of its class left out."""
    own = getattr(value, "__dict__", {})
    kind: Any = type(value)
    slots = _slots(kind)
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | own if slots else own


@lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    """A class may say one slot as a plain word."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return tuple(name for slots in found for name in ((slots,) if isinstance(slots, str) else slots))
