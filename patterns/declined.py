"""Caches that are recognised and refused: buffers written in place, and a cache of which only a part is stored.

Tried on values that an attention reads as keys or values and that no update explains. Each returns None ("not mine") or
raises a `Miss`: an attention over such a value has a cache, so it must not pass for one without.
"""

from __future__ import annotations

from kvpass.patterns.cache_buffer import ALLOCATIONS
from kvpass.patterns.unwritten import why_unwritten
from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import call_name, changes, is_input, operand
from kvpass.graph.dataflow import Flow
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import COPIES, SLICES, grows, nearby, whole


class BufferWrite:
    """A fixed buffer with the new tokens written into it: HF StaticCache, `cache[:, :, pos] = k`, `index_copy`."""

    name = "buffer"

    def match(self, base: fx.Node, flow: Flow) -> None:
        """Raises:
        Miss: UNSUPPORTED_UPDATE at the write, UNSUPPORTED_ATTENTION or PAGED_CACHE at the read.
        """
        for node in whole(base):
            written = node if call_name(node) in COPIES or changes(node) else _written(node)
            if written is not None and _is_kept(written):
                raise why_unwritten(base, written, flow)


class PartlyStored:
    """`cat([past, new])` that is not stored as the attention reads it: sliding windows, views, quantised caches."""

    name = "partly stored"

    def match(self, base: fx.Node, flow: Flow) -> None:
        """Raises:
        Miss: UNSUPPORTED_UPDATE at what is stored in place of the cat, UNSUPPORTED_ATTENTION at a slice of it.
        """
        if base in flow.outputs:
            above = [n for n in nearby(base, lambda n: n.all_input_nodes) if grows(n)]
            stored = base if above else None
        else:
            above = [n for n in whole(base) if grows(n)]
            below = (n for cat in above for n in nearby(cat, lambda n: n.users) if n in flow.outputs)
            stored = next(below, None)
        if stored in above:
            what, hint = f"the attention reads only a part of {above[0].name}", "let it read all that is cached"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, base, what, hint=f"{hint}, under a mask if it must not see all")
        if stored is not None:
            what = f"not {above[0].name} itself is stored, but {call_name(stored)} of it"
            hint = "return what torch.cat gives, as it is, and append to that in the next call"
            raise Miss(Reason.UNSUPPORTED_UPDATE, stored, what, hint=hint)


def _is_kept(write: fx.Node) -> bool:
    """Is it a buffer that is written into, and not what has just been computed (`qkv.clamp_()`, `k /= k.norm()`)?"""
    return any(is_input(home) or call_name(home) in ALLOCATIONS for home in whole(operand(write)))


def _written(buffer: fx.Node) -> fx.Node | None:
    """The node that writes into a tensor, or into a slice of it."""
    slices = [user for user in buffer.users if call_name(user) in SLICES]
    users = (user for part in (buffer, *slices) for user in part.users if operand(user) is part)
    return next((user for user in users if changes(user)), None)
