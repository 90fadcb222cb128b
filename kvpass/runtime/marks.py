"""What a caller says of the tokens of a call: which must stay, and to which span each belongs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from kvpass.errors import CacheError
from kvpass.kernels.rule import DROP, KEEP

_MARKS: ContextVar[torch.Tensor | None] = ContextVar("kvpass_marks", default=None)


@contextmanager
def marked(
    keep: torch.Tensor | None = None, spans: torch.Tensor | None = None, drop: torch.Tensor | None = None
) -> Iterator[None]:
    """Mark tokens for the calls inside the block, for policies with `protect.tokens` or `fair`:
    `with kvpass.marked(keep=mask): model.generate(**inputs)`.

    Args:
        keep: bool [B, T], tokens that are never evicted; they count against the budget.
        spans: int [B, T], from 0: the span that each token belongs to; each span keeps its share of the budget.
        drop: bool [B, T], tokens that only ask: they attend in their call (of several tokens) and leave with its end.

    Columns are positions in the sequence, padding included; later tokens are not marked and belong to span 0.

    Raises:
        CacheError: none is given, shapes differ, a span's number is negative or above a million, or a token is to be
            kept and dropped. When the model is called: the batch is another, or more tokens are marked than the budget
            holds.
    """
    given = [t for t in (keep, spans, drop) if t is not None]
    if not given or any(t.dim() != 2 or t.shape != given[0].shape for t in given):
        shapes = [list(t.shape) for t in given]
        raise CacheError(f"marks of shapes {shapes}", hint="give keep=, spans= or drop= as [batch, tokens]")
    if keep is not None and drop is not None and bool((keep.bool() & drop.bool()).any()):
        raise CacheError("a token cannot be kept and dropped", hint="let keep= and drop= mark different tokens")
    if spans is not None and spans.numel() and not 0 <= int(spans.min()) <= int(spans.max()) < KEEP:
        raise CacheError("spans are numbered from 0", hint=f"give numbers from 0 to {KEEP - 1}")
    marks = torch.zeros(given[0].shape, dtype=torch.int32, device=given[0].device)
    if spans is not None:
        marks += spans.to(torch.int32)
    for chosen, bit in ((keep, KEEP), (drop, DROP)):
        if chosen is not None:
            marks += chosen.to(torch.bool).to(torch.int32) * bit
    token = _MARKS.set(marks)
    try:
        yield
    finally:
        _MARKS.reset(token)


def marks_of(batch: int, tokens: int, position: int, device: torch.device) -> torch.Tensor:
    """The marks of a call's tokens, the first of which is at `position`: int32 [B, S], 0 where nothing was said."""
    given, out = _MARKS.get(), torch.zeros(batch, tokens, dtype=torch.int32, device=device)
    if given is None:
        return out
    if given.shape[0] != batch:
        raise CacheError(
            f"marks for a batch of {given.shape[0]}, but the call has {batch}",
            hint="give one row of marks for each sequence",
        )
    part = given[:, position : position + tokens].to(device)
    out[:, : part.shape[1]] = part
    return out
