"""Which spellings kvpass declines, and by which reason: all that may be declined."""

from __future__ import annotations

from spellings.spelling import Spelling


def predicted(spelling: Spelling) -> tuple[str, ...]:
    """Codes that a decline of this spelling may have; () if it must be matched."""
    return ()
