"""Memory keys and values of a core: what must hold for them, and their masks, proved to show them to every query."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.elements import Elements
from kvpass.graph.layouts import read_layout
from kvpass.graph.mask_proof import hidden_front
from kvpass.graph.miss import Miss
from kvpass.graph.views import chain_scale
from kvpass.sites.site import Core
from kvpass.terms import Layout

HIDES = "let every query see all memory keys: torch.ones in their columns of a mask, zeros in those of a bias"


def memory_layouts(core: Core) -> tuple[Layout, Layout]:
    """How the keys and values of a memory lie in theirs."""
    assert core.memory is not None
    both = zip((core.memory.k, core.memory.v), (core.axes.k, core.axes.v), strict=True)
    key, value = (read_layout(one.node, one.views, one.axis, roles, core.tiled) for one, roles in both)
    return key, value


def check_memory(core: Core, chains: tuple[tuple[fx.Node, ...], ...], masks: MemoryMasks) -> None:
    """Raises:
    Miss: a memory that the ops do not do as the model does.

    chains: views from the cached tensors down to where the memory joins them.
    """
    memory = core.memory
    if memory is None:
        return
    for joined, layout, above in zip((memory.k, memory.v), memory_layouts(core), chains, strict=True):
        if layout.token_axis != joined.axis:
            what = f"{joined.memory.name} is joined to what is cached along another axis than the tokens"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, joined.node, what)
        if chain_scale(above) != 1.0:
            what = f"what is cached is scaled before {joined.memory.name} is joined to it"
            raise Miss(Reason.UNSUPPORTED_ATTENTION, joined.node, what)
    if core.causal:
        what = f"is_causal=True counts from the first of {memory.count} memory keys, and hides the last tokens"
        hint = "pass a mask that is causal behind the memory: torch.ones(S, M + T, dtype=torch.bool).tril(M + T - S)"
        raise Miss(Reason.UNSUPPORTED_ATTENTION, core.node, what, hint=hint)
    hidden = masks.hidden(core, memory.count)
    if hidden:
        what = f"a mask hides some of the {memory.count} memory keys, or nothing shows that it does not ({hidden})"
        raise Miss(Reason.UNSUPPORTED_ATTENTION, core.node, what, hint=HIDES)


class MemoryMasks:
    """Proofs of one graph; layers share masks."""

    def __init__(self, elements: Elements) -> None:
        self.elements = elements
        self.found: dict[Any, str] = {}

    def hidden(self, core: Core, count: int) -> str:
        """What a mask may hide of the memory; "" if nothing."""
        key = core.terms, count
        if key not in self.found:
            parts = [(term.node, term.kind, term.axes, term.factor) for term in core.terms]
            self.found[key] = hidden_front(parts, count, self.elements)
        return self.found[key]
