"""Whether queries and new keys are the same tokens. Where they are not, cross-attention is named only where it is sure:
it stays dense without a word, even under strict=True.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvpass.errors import Reason
from kvpass.graph.calls import call_name, is_input
from kvpass.graph.miss import Miss
from kvpass.graph.nearby import nearby
from kvpass.graph.projections import foreign
from kvpass.graph.shapes import same, shape_of
from kvpass.sites.site import Site

_HINT = (
    "write each call's tokens into places of their own, buf[:, :, pos] = k, or append them: torch.cat([past, k], dim)"
)


def check_queries(site: Site) -> None:
    """Raises:
    Miss: QUERY_COUNT, UNSUPPORTED_UPDATE or CROSS_ATTENTION.
    """
    core, half = site.core, site.key
    new, queries = half.update.new, site.dims["S"]
    keys = shape_of(new)[half.layout.token_axis]
    alike = same(queries, keys)
    past = None if alike else _past(new)
    if past is not None:
        detail = f"{call_name(new)} makes all of {new.name} from {past.name}: which of its tokens are new is not known"
        raise Miss(Reason.UNSUPPORTED_UPDATE, new, detail, hint=_HINT)
    if foreign(core.q, new):
        what = "queries and keys are projected from different inputs"
        raise Miss(Reason.CROSS_ATTENTION, core.node, what if alike else f"{queries} queries but {keys} new keys")
    if not alike:
        what = f"{queries} queries but {keys} new keys, and nothing shows that these are of another sequence"
        raise Miss(Reason.QUERY_COUNT, core.node, what)


def _past(new: fx.Node) -> fx.Node | None:
    """The input of the call that a value of the same form is computed from, without a projection."""
    found = nearby(new, lambda n: n.all_input_nodes)
    return next((node for node in found if is_input(node) and _alike(shape_of(node), shape_of(new))), None)


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
