"""Keys of `layers` in a policy: numbers and ranges."""

from __future__ import annotations

import re

from kvpass.errors import PolicyError

_NUMBERS = re.compile(r"(-?\d+)|(\d+)-(\d+)")


def numbers_of(key: str, name: str) -> tuple[int, int]:
    """First and last layer of a key; below 0 counted from the end."""
    match = _NUMBERS.fullmatch(key)
    first, last = (int(n) for n in (match[1] or match[2], match[1] or match[3])) if match else (1, 0)
    if last < first:
        hint = "give a number, -1 for the last layer, or a range, e.g. 0-3"
        raise PolicyError(f"policy {name!r}: {key!r} in 'layers' names no layer", where="layers", hint=hint)
    return first, last
