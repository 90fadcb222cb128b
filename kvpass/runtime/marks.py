"""What a caller says of the tokens of a call: which must stay, and to which span each belongs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvpass.errors import CacheError
from kvpass.kernels.rank.marks import DROP, KEEP
from kvpass.runtime.marked_blocks import Block, entered, of_this_call

_SHAPE = "give keep=, spans= or drop= as [batch, tokens]: a tensor, an array or nested lists, one row for each sequence"


@contextmanager
def marked(keep: Any = None, spans: Any = None, drop: Any = None) -> Iterator[None]:
    """Mark tokens for the calls inside the block, for policies with `protect.tokens` or `fair`:
    `with kvpass.marked(keep=mask): model.generate(**inputs)`.

    Args:
        keep: bool (or 0 and 1) [B, T], tokens that are never evicted; they count against the budget.
        spans: int [B, T], from 0: the span that each token belongs to; each span keeps its share of the budget.
        drop: bool (or 0 and 1) [B, T], tokens that only ask: they attend in their call (of several tokens) and leave
            with its end.

    Each is a tensor, or what `torch.as_tensor` takes: an array, nested lists. Columns are positions in the sequence,
    padding included; later tokens are not marked and belong to span 0. Threads that are started inside the block have
    its marks, as tasks of asyncio do.

    Raises:
        CacheError: none is given; shapes, dtypes or values are wrong; or a token is to be kept and dropped. When the
            model is called: its policy does not read what is marked, the batch is another, or more tokens are marked
            than the budget holds. At the end: the calls ran in a thread that the marks did not reach.
    """
    words = {"keep": keep, "spans": spans, "drop": drop}
    given = {word: _tensor(word, value) for word, value in words.items() if value is not None}
    _check_shapes(given)
    with entered(Block(_joined(given), tuple(given))):
        yield


def _tensor(word: str, value: Any) -> torch.Tensor:
    """One kind of marks as integers.

    Raises:
        CacheError: it is no table of them.
    """
    try:
        marks = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{word}= is no table of marks: {' '.join(str(error).split())}"
        raise CacheError(what, hint=_SHAPE) from None
    if not marks.numel():
        raise CacheError(f"{word}= is empty, of shape {list(marks.shape)}", hint=_SHAPE)
    kind, spans = str(marks.dtype).removeprefix("torch."), word == "spans"
    if marks.is_floating_point() or marks.is_complex() or (spans and marks.dtype is torch.bool):
        valid = "spans are whole numbers: spans.long()" if spans else f"{word}= says yes or no: {word}.bool()"
        raise CacheError(f"{word}= is of dtype {kind}", hint=valid)
    marks = marks.long()
    least, most = int(marks.min()), int(marks.max())
    if spans and not 0 <= least <= most < KEEP:
        raise CacheError(f"spans are numbered from 0, not {least} to {most}", hint=f"give numbers from 0 to {KEEP - 1}")
    if not spans and not 0 <= least <= most <= 1:
        hint = f"give True or False for each token; {word}[batch, positions] = True marks tokens by their position"
        raise CacheError(f"{word}= holds numbers from {least} to {most}, not True and False", hint=hint)
    return marks.to(torch.int32)


def _check_shapes(given: dict[str, torch.Tensor]) -> None:
    shapes = {word: list(marks.shape) for word, marks in given.items()}
    if not given or any(len(shape) != 2 or shape != next(iter(shapes.values())) for shape in shapes.values()):
        listed = ", ".join(f"{word} {shape}" for word, shape in shapes.items()) or "nothing"
        raise CacheError(f"marks of shapes that do not fit: {listed}", hint=_SHAPE)


def _joined(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """All kinds in one number for each token: int32 [B, T]."""
    device = next(iter(given.values())).device
    factors = {"keep": KEEP, "spans": 1, "drop": DROP}
    marks = sum(part.to(device) * factors[word] for word, part in given.items())
    assert isinstance(marks, torch.Tensor)
    if bool((marks >= KEEP + DROP).any()):
        raise CacheError("a token cannot be kept and dropped", hint="let keep= and drop= mark different tokens")
    return marks


def check_read(reads: Sequence[str], where: str) -> None:
    """Refuse a call whose policy does not read what the caller marked.

    reads: of `keep`, `spans` and `drop`.

    Raises:
        CacheError: naming the kind of marks and what would read it.
    """
    block = of_this_call()
    unread = [word for word in block.words if word not in reads] if block is not None else []
    if unread:
        theirs = f"reads {' and '.join(reads)} only" if reads else "reads no marks"
        hint = _READ_BY[unread[0]]
        raise CacheError(f"kvpass.marked({unread[0]}=..) around a call whose policy {theirs}", where=where, hint=hint)


_READ_BY = {
    "keep": "choose a policy with protect: {tokens: true}, e.g. whitelist, or call outside of the block",
    "drop": "choose a policy with protect: {tokens: true} that evicts, e.g. judge_q, or call outside of the block",
    "spans": "choose a policy with fair: true, e.g. fair, or call outside of the block",
}
"""What reads each kind of marks."""


def marks_of(batch: int, tokens: int, position: int, device: torch.device) -> torch.Tensor:
    """The marks of a call's tokens, the first of which is at `position`: int32 [B, S], 0 where nothing was said.

    Raises:
        CacheError: they are for another batch, or drop the only token of the call.
    """
    block, out = of_this_call(position), torch.zeros(batch, tokens, dtype=torch.int32, device=device)
    if block is None:
        return out
    if block.marks.shape[0] != batch:
        raise CacheError(
            f"marks for a batch of {block.marks.shape[0]}, but the call has {batch}",
            hint="give one row of marks for each sequence",
        )
    part = block.marks[:, position : position + tokens].to(device)
    if tokens == 1 and "drop" in block.words and bool((part >= DROP).any()):
        raise CacheError(
            f"the token at {position} is to be dropped, but it comes alone",
            hint="tokens that only ask attend in a call of several: give them together with the prompt",
        )
    out[:, : part.shape[1]] = part
    return out
