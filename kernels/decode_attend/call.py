"""What one step is given, beside the state: the token, and the facts of the call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, folded, token_bounds, tokens_of
from kvpass.kernels.codecs.entries import entries_of
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.state import State
from torch import Tensor


class Token(NamedTuple):
    """One token of each sequence."""

    q: Tensor
    """[B, Hq, 1, D]"""
    k: Tensor
    """[B, Hkv, 1, D]"""
    v: Tensor
    """[B, Hkv, 1, Dv]"""
    arrive: Tensor | None = None
    """float32 [N, B, Hkv]: the statistics of its slot before this query adds to them; None: zeros."""

    def of(self, b: int) -> Token:
        """That of one sequence."""
        one = slice(b, b + 1)
        arrive = None if self.arrive is None else self.arrive[:, one]
        return Token(self.q[one], self.k[one], self.v[one], arrive)


class Call(NamedTuple):
    """What is the same for all heads. Facts of three kinds, by when they are known (docs/design/0008): `rule`, `latent`
    `sees` and `softmax` but for its sinks when the graph is compiled; `position` on the host, once per call; `mask`,
    `tokens`, `bounds` and sinks on the device.
    """

    mask: Tensor | None
    """None, bool or additive float, broadcastable to [B, Hq, 1, T]."""
    position: int
    """Of the token, padding included."""
    softmax: Softmax
    rule: Rule
    latent: int = 0
    """Above 0, the values are the first so many entries of the keys."""
    sees: Sees = Sees()
    """What the query sees; with a mask, the mask says it all."""
    tokens: Tensor | None = None
    """bool [1 or B, T], hides columns that hold no token; None with a mask."""
    bounds: Tensor | None = None
    """Of `token_bounds`, with `tokens`."""
    at: Tensor | None = None
    """int [1], the position on the device; `position` means nothing then."""

    @classmethod
    def of_step(
        cls, mask: Tensor | None, position: int, softmax: Softmax, rule: Rule, latent: int = 0, sees: str = "",
        tokens: Tensor | None = None, bounds: Tensor | None = None, at: Tensor | None = None,
    ) -> Call:  # fmt: skip
        """What `decode_attend` is given: a mask says it all from here on, and tokens have their bounds."""
        words = Sees.parse(sees)
        if mask is not None and mask.is_floating_point() and mask.device.type == "cpu":
            columns = tokens_of(mask)  # numbers that only hide, as most models write them
            if columns is not None:
                tokens = columns if tokens is None else tokens[:, : columns.shape[1]] & columns
                mask = bounds = None
        if mask is not None:
            if at is None:
                mask = folded(mask, words, tokens, position)
            else:
                mask = folded(mask, Sees(), _seen_from(mask, words, tokens, at), 0)
            words, tokens, bounds = Sees(), None, None
        elif tokens is not None and bounds is None:
            bounds = token_bounds(tokens, position, 1, at)
        return cls(mask, position, softmax, rule, latent, words, tokens, bounds, at)

    @property
    def low(self) -> int:
        """The first position that the query sees."""
        return self.sees.lowest(self.position)

    def columns(self) -> tuple[str, Tensor | None, Tensor | None] | None:
        """What the query sees without a mask: words, tokens and their bounds. None: a mask says more, of heads or by
        numbers, or is a column for all.
        """
        if self.mask is None:
            return self.sees.encode(), self.tokens, self.bounds
        if self.mask.dtype != torch.bool or self.mask.shape[1] != 1 or self.mask.shape[3] <= self.position:
            return None
        tokens = self.mask[:, 0, 0]
        return "", tokens, token_bounds(tokens, self.position, 1)

    def of(self, b: int) -> Call:
        """That of one sequence."""
        cut = [x if x is None or x.shape[0] == 1 else x[b : b + 1] for x in (self.mask, self.tokens, self.bounds)]
        softmax = self.softmax.of(slice(b, b + 1))
        return self._replace(mask=cut[0], tokens=cut[1], bounds=cut[2], softmax=softmax)

    def values(self, state: State) -> Tensor:
        """[B, Hkv, C, Dv], as the model has them."""
        return state.k[..., : self.latent] if self.latent else entries_of(state, "v", self.rule)


def lowest(sees: Sees, at: Tensor) -> Tensor | None:
    """The first position that a query at a position on the device sees, the shape of `at`; None: the very first."""
    found = []
    if sees.window:
        found.append(at - sees.window + 1)
    if sees.chunk:
        found.append(at // sees.chunk * sees.chunk)
    if not found:
        return None
    low = found[0] if len(found) == 1 else torch.maximum(*found)
    return low.clamp(min=0)


def _seen_from(mask: Tensor, sees: Sees, tokens: Tensor | None, at: Tensor) -> Tensor | None:
    """The tokens, bool [1 or B, T], without those before what the words show; None if all are seen."""
    low = lowest(sees, at.view(1, 1))
    if low is None:
        return tokens
    later = torch.arange(mask.shape[-1] if tokens is None else tokens.shape[1], device=mask.device) >= low
    return later if tokens is None else later & tokens
