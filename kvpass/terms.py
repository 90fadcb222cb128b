"""Shared words as types. Imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Prefill: empty past. Extend: past and several queries. Decode: past and one query."""

    PREFILL = "prefill"
    EXTEND = "extend"
    DECODE = "decode"


class Layout(StrEnum):
    """Axis order in which the host caches K and V."""

    BHTD = "BHTD"
    BTHD = "BTHD"

    @property
    def token_axis(self) -> int:
        return self.value.index("T")

    @property
    def head_axis(self) -> int:
        return self.value.index("H")


class CacheForm(StrEnum):
    """How a cache update is spelled."""

    CONCAT = "cat(past, new)"
    EMPTY = "cat(empty, new)"
    RETURNED = "new returned as the cache"
    BUFFER = "new written into a buffer"


class MaskKind(StrEnum):
    """What a part of a mask does to the logits."""

    ADD = "added"
    KEEP = "True is kept"
    HIDE = "True is hidden"
