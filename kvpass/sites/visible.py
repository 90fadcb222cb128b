"""Which keys each site's queries see, proved from its graph. Layers share proofs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvpass.graph.calls import example
from kvpass.graph.element_steps import STEPS
from kvpass.graph.elements import Elements, scalar
from kvpass.graph.mask_proof import Q, visibility
from kvpass.graph.shapes import is_one, shape_of
from kvpass.graph.visibility import Visibility
from kvpass.sites.site import Site
from kvpass.terms import CacheForm, Phase


class Proofs:
    """Proofs of one graph, by what they were made of."""

    def __init__(self) -> None:
        self.found: dict[Any, Visibility] = {}
        self.elements = Elements(STEPS)

    def of(self, site: Site) -> Site:
        """The site with what its queries see."""
        core, position = site.core, self._position(site)
        buffered = site.key.update.form is CacheForm.BUFFER
        key = core.terms, core.causal, position, buffered, core.behind
        if key not in self.found:
            parts = [(term.node, term.kind, term.axes, term.factor) for term in core.terms]
            seen = visibility(parts, replace(site.seen, read=()), position, self.elements, core.behind)
            if buffered and (seen.corner or not seen.causal):  # the mask hides what nobody wrote
                why = seen.why or ("what is not written is not hidden by causality",) * bool(parts)
                seen = replace(site.seen, why=why)
            self.found[key] = seen
        return replace(site, seen=self.found[key])

    def _position(self, site: Site) -> Any:
        """Of query `Q`, as a formula."""
        update, place = site.key.update, 0 if is_one(site.dims["S"]) else Q
        if site.phase is Phase.PREFILL:
            return place
        assert update.past is not None
        if update.form is not CacheForm.BUFFER:
            return scalar(shape_of(update.past)[site.key.layout.token_axis]) + place
        if isinstance(update.start, fx.Node) and isinstance(example(update.start), torch.Tensor):
            axes = len(shape_of(update.start))
            return self.elements.at(update.start, (0,) * (axes - 1) + (place,) * (axes > 0)) + (0 if axes else place)
        return scalar(update.start) + place
