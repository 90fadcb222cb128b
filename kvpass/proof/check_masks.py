"""Proofs of masks against the masks: on the inputs that a graph is compiled for, where those are small enough."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from kvpass.errors import VerificationError
from kvpass.graph.calls import example
from kvpass.graph.extract import functions_of
from kvpass.graph.miss import Miss
from kvpass.graph.symbols import SizeReader, hinted
from kvpass.kernels.attention.masks import threshold
from kvpass.kernels.attention.visibility import Sees, Shown, as_mask
from kvpass.plan.plan import Plan
from kvpass.runtime.bind import written_at
from kvpass.sites.rows import is_regrouped, rows_of_sequence
from kvpass.sites.site import Site, Term
from kvpass.terms import CacheForm, MaskKind, Phase

log = logging.getLogger(__name__)

LARGEST = 1 << 22
"""Elements of a mask that is still looked at: 2,048 tokens by themselves. Formulas hold for all sizes."""

LONGEST = 400
"""Operations that are computed for it, at most: a mask that hangs on a model's hidden states would cost half of it."""


def check_masks(gm: fx.GraphModule, plan: Plan, bindings: Sequence[Any], args: Sequence[Any]) -> None:
    """Compute each proved mask as the graph does, and see that it is what its words say.

    Args:
        gm: as captured.
        bindings: of the plan's sites.
        args: what the graph is compiled for; where that is fake, there is nothing to compare.

    Raises:
        VerificationError: naming the site. A bug in kvpass, never the user's fault.
    """
    args = hinted(args)
    if any(value is None or isinstance(value, FakeTensor) for value in args):
        return
    sizes, done = SizeReader(gm.graph.find_nodes(op="placeholder")), set()
    for planned, binding in zip(plan.sites, bindings, strict=True):
        site = planned.site
        terms = tuple(term for at, term in enumerate(site.core.terms) if at not in site.seen.read)
        key = terms, str(site.dims["S"]), site.core.causal
        if not terms or key in done:
            continue
        done.add(key)
        count, batch = (sizes.read(site.dims[letter])(args) for letter in "SB")
        keys = max(sizes.read(example(term.node).shape[-1])(args) for term in terms) - site.core.behind
        if batch * count * keys > LARGEST:
            log.info("masks: %s is proved and too large to look at (%d x %d x %d)", site.name, batch, count, keys)
            continue
        position = _position(site, binding, sizes, args)
        try:
            with torch.no_grad():
                _check(gm, site, terms, args, (count, keys, position, batch))
        except Miss as miss:
            log.info("masks: %s is proved and not looked at: %s", site.name, miss)


def _position(site: Site, binding: Any, sizes: SizeReader, args: Sequence[Any]) -> int:
    """Of the call's first query."""
    update = site.key.update
    if site.phase is Phase.PREFILL:
        return 0
    if update.form is CacheForm.BUFFER:
        return written_at([binding], args)[0]
    return sizes.read(example(update.past).shape[site.key.layout.token_axis])(args)  # type: ignore[arg-type]


def _check(
    gm: fx.GraphModule, site: Site, terms: tuple[Term, ...], args: Sequence[Any], shape: tuple[int, int, int, int]
) -> None:
    count, keys, position, batch = shape
    tokens = site.seen.tokens
    wanted = [*(term.node for term in terms), *([] if tokens is None else [tokens])]
    values = functions_of(gm, wanted, limit=LONGEST)(args)
    real = values[-1] != 0 if tokens is not None else None
    if real is not None and len(real) > 1:
        real = real.repeat_interleave(rows_of_sequence(site), 0)
    wrong = ""
    if real is not None and real.shape[1] < position + count:
        wrong = f"its tokens {list(real.shape)} end before the call"
    else:
        seen = Shown(Sees.parse(site.seen.words), count, position, real)
        differ = _differs(as_mask(seen, keys), _parts(site, terms, values, batch), site.core.causal)
        if bool(differ.any()):
            wrong = f"and {int(differ.sum())} of {differ.numel()} elements differ"
    if wrong:
        raise VerificationError(
            f"a mask was taken for {str(site.seen)!r}, {wrong}",
            where=f"{site.name}, {site.source}",
            hint="a bug in kvpass, not in the model: please report it with the folder of debug=True; until it is fixed "
            "run the model without kvpass",
        )


def _parts(site: Site, terms: tuple[Term, ...], values: Sequence[Tensor], batch: int) -> list[tuple[Term, Tensor]]:
    """Parts of a mask with their values, without the columns of a memory, which are proved apart."""
    both = zip(terms, values, strict=False)
    kept = [(term, value if value.shape[-1] == 1 else value[..., site.core.behind :]) for term, value in both]
    return [(term, _four_axes(site, term, value, batch)) for term, value in kept]


def _differs(words: Tensor, parts: list[tuple[Term, Tensor]], causal: bool) -> Tensor:
    """Where the parts of a mask together are not what the words say, bool [B, H, S, T] or less."""
    shown: Tensor
    odd: Tensor
    shown, odd = torch.ones_like(words), torch.zeros_like(words)
    if causal:
        shown = shown.tril()
    for term, value in parts:
        mask = value.to(words.device)
        if term.kind is MaskKind.ADD:
            mask = mask * term.factor
            seen = mask == 0
            odd = odd | (~seen & (mask > threshold(mask)))
        else:
            seen = mask.bool() if term.kind is MaskKind.KEEP else ~mask.bool()
        shown = shown & seen
    return (shown != words) | odd


def _four_axes(site: Site, term: Term, mask: Tensor, batch: int) -> Tensor:
    """A part of a mask with axes that broadcast to [B, H, S, T]."""
    missing = len(term.axes) - mask.dim()
    mask = mask[(None,) * missing + (...,)] if missing > 0 else mask
    if is_regrouped(site, term):
        views = batch * site.dims["Hq"] // math.prod(term.heads)
        rows: Tensor = mask.expand(views, *term.heads, -1, -1).flatten(0, len(term.heads)).unflatten(0, (batch, -1))
        return rows
    if "N" in term.axes:
        shared: Tensor = mask.unflatten(0, (1, 1) if len(mask) == 1 else (batch, -1))
        return shared
    return mask.flatten(1, 2) if "G" in term.axes else mask
