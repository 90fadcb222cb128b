"""What a kernel refuses because of the data it is given, in words for users: runtime/bind.py says where it happened."""

from __future__ import annotations


class DataError(ValueError):
    """`hint` says what a user can do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class MaskError(DataError):
    """A mask shows what no cache holds."""


class MarkError(DataError):
    """The caller marks more tokens than the budget holds."""


class RotationError(DataError):
    """Keys cannot be turned to other positions."""


class TableError(DataError):
    """A policy's file of weights or shares cannot be read, or does not fit the model."""


class RanksError(DataError):
    """Heads of other ranks cannot be had, or not in such a call."""


class ScorerError(DataError):
    """A scorer failed, or gave what are no scores."""
