"""What a kernel refuses because of the data it is given, in words for users: runtime/bind.py says where it happened."""

from __future__ import annotations


class MaskError(ValueError):
    """A mask shows what no cache holds. `hint` says what a user can do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint
