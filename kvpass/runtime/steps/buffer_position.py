"""Where a call's tokens are written into preallocated buffers: an input of the graph."""

from __future__ import annotations

from kvpass.kernels.rule import Rule
from kvpass.runtime.step import CallFacts, SharedInput
from kvpass.terms import CacheForm, Phase


class BufferPosition(SharedInput):
    """A number, the same for all sites that write into a buffer that an earlier call has written to."""

    name = "position"

    def applies(self, rule: Rule, phase: Phase, form: CacheForm) -> bool:
        return form is CacheForm.BUFFER and phase is not Phase.PREFILL

    def value(self, call: CallFacts) -> int:
        return max(call.positions)


POSITION = BufferPosition()
