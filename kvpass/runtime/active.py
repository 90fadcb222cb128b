"""Which call of a compiled model is under way in this thread. Imports nothing, so that whoever asks costs nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpass.runtime.watch import Call


class Active(threading.local):
    """Calls under way, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


ACTIVE = Active()


def current() -> Call | None:
    """The call of a compiled model that is under way in this thread."""
    return ACTIVE.calls[-1] if ACTIVE.calls else None
