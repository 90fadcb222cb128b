"""Shared words as types. Imports nothing of ours."""

from __future__ import annotations

from enum import Enum


class Phase(str, Enum):
    """Prefill: empty past. Extend: past and several queries. Decode: past and one query."""

    PREFILL = "prefill"
    EXTEND = "extend"
    DECODE = "decode"


class Layout(str, Enum):
    """Axis order in which the host caches K and V."""

    BHTD = "BHTD"
    BTHD = "BTHD"

    @property
    def token_axis(self) -> int:
        return self.value.index("T")

    @property
    def head_axis(self) -> int:
        return self.value.index("H")


class CacheForm(str, Enum):
    """How a cache update is spelled."""

    CONCAT = "cat(past, new)"
    EMPTY = "cat(empty, new)"
    RETURNED = "new returned as the cache"
