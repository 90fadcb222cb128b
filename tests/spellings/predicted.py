"""Which spellings kvpass declines, and by which reason: all that may be declined.

A line here is a promise to users that this is not done, so it stands where the project decided so.
"""

from __future__ import annotations

from spellings.spelling import Spelling

GRAPH_BREAK = "graph break"
"""No reason code: the error says where Dynamo broke the graph between a write and the attention."""


def predicted(spelling: Spelling) -> tuple[str, ...]:
    """Codes that a decline of this spelling may have; () if it must be matched."""
    codes = []
    if spelling.beside == "unrotated":  # what is cached is not what the attention reads, and the hint says so
        codes.append("KEY_ESCAPES")
    if spelling.read == "front_tensor":  # a tensor as the end of a slice: Tensor.item(), which Dynamo does not trace
        codes.append(GRAPH_BREAK)
    return tuple(codes)
