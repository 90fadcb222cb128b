"""Who sees whom, in words instead of a mask: for each query an interval of positions, and which columns hold a token.

    causal              up to the query's own position p
    causal corner       up to position i, the query's place in its call (`is_causal` of torch is so, whatever is past)
    window=w            from p - w + 1 on
    chunk=c             from p // c * c on, and below p // c * c + c
    mean                queries that see nothing get the mean of all values, as a softmax of equal logits gives it;
                        without, zeros

`tokens` bool [1 or B, T] hides columns that hold no token; `bounds` is what a call knows of it, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from kvpass.kernels.attention.masks import causal_span, count_shown, simplified, visible
from torch import Tensor

FIRST, END, BEFORE, COUNT = range(4)
"""Columns of `bounds`: the first column that holds a token and one past the last, below the call's end (both the end if
there is none); tokens before the call; tokens in all.
"""


@dataclass(frozen=True)
class Sees:
    """The words. None at all: a query sees every key.

    Attributes:
        window, chunk: positions, 0 for none.
    """

    causal: bool = False
    corner: bool = False
    window: int = 0
    chunk: int = 0
    mean: bool = False

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Sees:
        """Inverse of `encode`.

        Raises:
            TypeError: a word that is none of the above.
        """
        parts = (word.partition("=") for word in text.split())
        said: dict[str, Any] = {word: int(number) if given else True for word, given, number in parts}
        return Sees(**said)

    def encode(self) -> str:
        """The words as the ops take them."""
        flags = [word for word in ("causal", "corner") if getattr(self, word)]
        sizes = [f"{word}={getattr(self, word)}" for word in ("window", "chunk") if getattr(self, word)]
        return " ".join(flags + sizes + ["mean"] * self.mean)

    def within(self, queries: int, position: int) -> Sees:
        """The same for a call whose queries begin at `position`, without words that hide nothing in it."""
        end = position + queries
        window = self.window if self.window < end else 0
        return Sees(self.causal, self.corner and position > 0, window, self.chunk if self.chunk < end else 0, self.mean)

    def lowest(self, p: int) -> int:
        """The first position that a query at position p sees."""
        return max(p - self.window + 1 if self.window else 0, p // self.chunk * self.chunk if self.chunk else 0, 0)

    def shown(self, where: Tensor, p: Tensor, i: Tensor | None = None) -> Tensor | None:
        """Which positions `where` queries at positions p see, as bool of the shape that both broadcast to; None if all.

        i: their places in their call, for `corner`.
        """
        parts: list[Tensor] = []
        if self.causal:
            parts.append(where <= (i if self.corner and i is not None else p))
        if self.window:
            parts.append(where > p - self.window)
        if self.chunk:
            parts.append(where // self.chunk == p // self.chunk)
        if not parts:
            return None
        found = parts[0]
        for part in parts[1:]:
            found = found & part
        return found


def token_bounds(tokens: Tensor, position: int, queries: int, at: Tensor | None = None) -> Tensor:
    """What a call knows of its tokens: int32 [1 or B, 4], see `FIRST`. Pure torch, any device.

    tokens: bool [1 or B, T], T at least position + queries; position: of the first of the call's queries. at: int [1],
    that position on the device, which is not read: `position` means nothing then.
    """
    if at is not None:
        return _bounds_at(tokens, at, queries)
    end = position + queries
    here = tokens[:, :end]
    column = torch.arange(end, dtype=torch.int32, device=tokens.device)
    first = torch.where(here, column, end).amin(-1)
    last = torch.where(here, column + 1, 0).amax(-1)
    last = torch.where(last > 0, last, end)
    before, count = here[:, :position].sum(-1), here.sum(-1)
    return torch.stack([first, last, before, count], -1).int()


def _bounds_at(tokens: Tensor, at: Tensor, queries: int) -> Tensor:
    """The same by comparison with all columns."""
    begin = at.view(1, 1)
    column = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    end = (begin + queries).int()
    here = tokens & (column < end)
    first = torch.where(here, column, end).amin(-1, keepdim=True)
    last = torch.where(here, column + 1, 0).amax(-1, keepdim=True)
    last = torch.where(last > 0, last, end)
    before, count = (here & (column < begin)).sum(-1, keepdim=True), here.sum(-1, keepdim=True)
    return torch.cat([first, last, before, count], -1).int()


def mask_spans(mask: Tensor) -> Tensor:
    """A prompt's mask looked at, once for all layers: int32 [1 or B, 4] as `token_bounds`, of sequences whose mask
    [1 or B, 1, S, S] is causal over neighbouring tokens; COUNT is -1 for others. On other devices than CPUs for all:
    nothing is read back, and their kernels survey a mask themselves.
    """
    found, queries = mask.new_zeros(mask.shape[0], 4, dtype=torch.int32), mask.shape[2]
    found[:, COUNT] = -1
    if mask.device.type == "cpu" and mask.shape[1] == 1 and mask.shape[3] >= queries > 0:
        for row, one in zip(found, simplified(mask), strict=True):
            span = causal_span(one[0, :, :queries]) if one.dtype == torch.bool else None
            if span is not None:
                row.copy_(torch.tensor([*span, 0, span[1] - span[0]]))
    return found


class Shown(NamedTuple):
    """What a call of several tokens may see, beside the positions of its keys."""

    sees: Sees
    queries: int
    position: int = 0
    """Of the first query."""
    tokens: Tensor | None = None
    """bool [1 or B, T], T at least position + queries; None: every column holds a token."""
    bounds: Tensor | None = None
    """Of `token_bounds`; without tokens those of `mask_spans`: a prompt's, which are all neighbours."""
    mask: Tensor | None = None
    """Hides more, or adds: 4-d, broadcastable to [B, Hq, S, T]."""
    bias: Tensor | None = None
    """float32 [B, Hkv, L], added to the logits of each key."""

    def of_rows(self, batch: slice) -> Shown:
        """That of some sequences."""
        given = self.tokens, self.bounds, self.mask, self.bias
        cut = [x if x is None or x.shape[0] == 1 else x[batch] for x in given]
        return self._replace(tokens=cut[0], bounds=cut[1], mask=cut[2], bias=cut[3])

    def arrived(self, batch: int, device: torch.device) -> Tensor:
        """Which of the call's own tokens are valid, bool [B, S]: some query of the call, in some head, may see it."""
        end = self.position + self.queries
        own = torch.ones(1, 1, dtype=torch.bool, device=device)
        if self.tokens is None and self.bounds is not None:
            place = torch.arange(self.queries, device=device)
            own = (place >= self.bounds[:, FIRST, None]) & (place < self.bounds[:, END, None])
        if self.tokens is not None:
            own = self.tokens[:, self.position : end]
        if self.mask is not None:
            part = self.mask if self.mask.shape[-1] == 1 else self.mask[..., self.position : end]
            own = own & visible(part).any(2).any(1)
        return own.expand(batch, self.queries).clone(memory_format=torch.contiguous_format)

    def keys(self, where: Tensor, top: int, bottom: int) -> Tensor:
        """`at` for queries top .. bottom - 1 of the call."""
        return self.at(where, torch.arange(top, bottom, device=where.device)[None])

    def at(self, where: Tensor, place: Tensor) -> Tensor:
        """What the words and the tokens show of keys at positions `where`, int [1 or B, 1 or Hkv, L], -1 = none, to
        queries `place`, int [1 or B, n], of the call: bool [1 or B, 1 or Hkv, 1 or n, L].
        """
        place = place[:, None, :, None]
        shown = where >= 0
        if self.tokens is not None:
            index = where.clamp(min=0).long()
            rows = max(len(where), len(self.tokens))
            tokens = self.tokens[:, None].expand(rows, where.shape[1], -1)
            shown = shown & tokens.gather(2, index.expand(rows, *where.shape[1:]))
        allowed = self.sees.shown(where[:, :, None], place + self.position, place)
        return shown[:, :, None] if allowed is None else shown[:, :, None] & allowed

    def blind(self) -> Tensor | None:
        """Queries that see no key of a call without a past, as far as words and tokens say: bool [1 or B, S]; None if
        there are none for sure.
        """
        if self.tokens is None:
            if self.bounds is None:
                return None
            return torch.arange(self.queries, device=self.bounds.device) < self.bounds[:, FIRST, None]
        if self.tokens.device.type == "cpu" and self.bounds is not None and self._sees_the_first():
            return None
        counts = self.tokens[:, : self.queries].cumsum(-1)
        place = torch.arange(self.queries, device=counts.device)
        low = torch.zeros_like(place)
        if self.sees.window:
            low = (place - self.sees.window + 1).clamp(min=0)
        if self.sees.chunk:
            low = torch.maximum(low, place // self.sees.chunk * self.sees.chunk)
        high = place if self.sees.causal else torch.full_like(place, self.queries - 1)
        if self.sees.chunk and not self.sees.causal:
            high = torch.minimum(high, low + self.sees.chunk - 1)
        before = torch.where(low > 0, counts[:, (low - 1).clamp(min=0)], 0)
        return counts[:, high] == before

    def _sees_the_first(self) -> bool:
        """Whether all columns hold tokens, or each query sees the first of them."""
        assert self.bounds is not None
        alike = not self.sees.within(self.queries, self.position).window and not self.sees.chunk
        return all((first == 0 and alike) or count == self.queries for first, _, _, count in self.bounds.tolist())


def said_in_words(shown: Shown, prompt: bool) -> Shown:
    """The same, with the mask in words where a look at it finds that they say all of it: a prompt's that is causal over
    neighbouring tokens, and one that is the same for all queries and hides columns. On a CPU: it reads the mask.
    """
    mask, queries = shown.mask, shown.queries
    assert mask is not None
    words = replace(shown.sees, mean=shown.sees.mean or mask.dtype != torch.bool)
    alone = shown.tokens is None and replace(words, mean=False) == Sees()
    if prompt and alone and mask.shape[1] == 1 and mask.shape[2] == queries > 1:
        spans = mask_spans(mask) if shown.bounds is None else shown.bounds
        if all(count >= 0 for *_, count in spans.tolist()):
            return shown._replace(sees=replace(words, causal=True), bounds=spans, mask=None)
    tokens = tokens_of(mask) if mask.shape[3] >= shown.position + queries else None
    if tokens is None:
        known = None if shown.tokens is None else shown.bounds
        if shown.tokens is not None and known is None:
            known = token_bounds(shown.tokens, shown.position, queries)
        return shown._replace(bounds=known)
    if shown.tokens is not None:
        tokens = tokens & shown.tokens[:, : tokens.shape[1]]
    bounds = token_bounds(tokens, shown.position, queries)
    return shown._replace(sees=words, tokens=tokens, bounds=bounds, mask=None)


def tokens_of(mask: Tensor) -> Tensor | None:
    """A mask [1 or B, 1, 1, T] as the columns that it shows, bool [1 or B, T]; None if it says more. Reads it."""
    if mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] < 2:
        return None
    seen = simplified(mask)
    return seen[:, 0, 0] if seen.dtype == torch.bool else None


def shown_before(sees: Sees, bounds: Tensor | None, mask: Tensor | None, position: int) -> Tensor | int:
    """How many tokens before a call some query of it may see at most, for `check_shown`: int [1 or B], or an int."""
    found: Tensor | int = min(position, position - sees.lowest(position))
    if bounds is not None:
        found = bounds[:, BEFORE].clamp(max=found)
    if mask is not None:
        found = count_shown(mask, position).clamp(max=found)
    return found


def folded(mask: Tensor, sees: Sees, tokens: Tensor | None, position: int) -> Tensor:
    """A step's mask [.., 1, T], and what words and tokens hide beside it, as one."""
    low = sees.lowest(position)
    shown = None if tokens is None else tokens[:, None, None]
    if low > 0:
        later = torch.arange(mask.shape[-1] if tokens is None else tokens.shape[1], device=mask.device) >= low
        shown = later if shown is None else shown & later
    if shown is None:
        return mask
    if mask.shape[-1] > 1:
        shown = shown[..., : mask.shape[-1]]
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, float("-inf"))


def as_mask(shown: Shown, keys: int) -> Tensor:
    """The words and tokens as the mask that they stand for, bool [1 or B, 1, S, T]: what a proof is checked by."""
    device = shown.tokens.device if shown.tokens is not None else "cpu"
    found = shown.keys(torch.arange(keys, device=device)[None, None], 0, shown.queries)
    return found.expand(-1, -1, shown.queries, -1)
