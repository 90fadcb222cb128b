"""Masks over a cache of rows, [N, ..], in which sequences and heads share one axis: each row is a sequence of the site.

Such logits, [N, S, T], are often viewed as [B, H, S, T] to be masked, and back. Rows are numbered as B * H counts them.
"""

from __future__ import annotations

import math

from kvpass.errors import Reason
from kvpass.graph.miss import Miss
from kvpass.graph.shapes import is_one, shape_of
from kvpass.sites.site import Site, Term


def is_regrouped(site: Site, term: Term) -> bool:
    """Whether a part of a mask counts sequences and heads otherwise than the site, and differs between them."""
    wide = not all(is_one(size) for size in shape_of(term.node)[:-2])
    return wide and bool(term.heads) and math.prod(term.heads) != site.dims["Hq"]


def rows_of_sequence(site: Site) -> int:
    """How many of the site's sequences a sequence is of which tokens are proved."""
    proved = [term for at, term in enumerate(site.core.terms) if at not in site.seen.read]
    return max((math.prod(t.heads) // site.dims["Hq"] for t in proved if is_regrouped(site, t)), default=1)


def check_rows(site: Site) -> None:
    """Raises:
    Miss: a part of a mask is of sequences and heads that are not whole sequences of the site.
    """
    heads, joined = site.dims["Hq"], "N" in site.core.axes.q
    for term in site.core.terms:
        wide = not all(is_one(size) for size in shape_of(term.node)[:-2])
        unknown = joined and wide and "H" in term.axes and not term.heads
        if unknown or (is_regrouped(site, term) and (not joined or math.prod(term.heads) % heads)):
            viewed = " x ".join(map(str, term.heads)) or "an unknown number of"
            what = f"the mask is of {viewed} heads, over a cache of {heads} whose sequences and heads share one axis"
            hint = "cache keys and values as [B, H, T, D], or mask the logits before they are viewed with other heads"
            raise Miss(Reason.LAYOUT, term.node, what, hint=hint)
