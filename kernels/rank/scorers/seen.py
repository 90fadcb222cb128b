"""What a scorer sees of a layer's keys, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

READS = ("keys", "values", "hidden", "queries", "rows", "logits", "statistics", "layer", "marks", "own", "places")
"""What a scorer may ask for. `hidden`: what the attention block reads; `queries`: before their rotation; `rows` and
`logits`: of the observation window; `statistics`: what attention emitted; `marks`: of the caller; `layer`: its number,
which costs that layers no longer share what is computed for a graph; `own`: the call's tokens alone, scores of older
slots stay (as with `hidden`); `places`: `Seen.pos` exactly, which costs a number per slot.
"""

NOT_FROM_GRAPH = frozenset({"statistics", "layer", "marks", "own", "places"})
"""Words of `READS` for which nothing more is taken from a graph."""

Asked = TypeVar("Asked", Tensor, int)


class _Unsaid(ValueError):
    """A scorer asks `Seen` for what it did not say that it reads."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Seen:
    """What a scorer sees: the L keys of one layer at the end of a call, in position order.

    Attributes:
        pos: int32 [B, Hkv, L]: which of its row's valid tokens each key is, from 0; -1 = empty or padding. Without
            `places`, in a row with padding between its tokens, older slots' may be too high, in the same order.
        candidate: bool [B, Hkv, L]: keys that may stay; padding and empties may not, and must not sway a score.
        end: int [B, Hkv, 1]: one past the last candidate's.
        first: int [B, Hkv, 1]: 0, the row's first valid token.
        seen: int64 [B, Hkv, 1]: valid tokens so far.
        budget: int64 [B, Hkv, 1]: slots that each head may hold, on average over the heads.
        window: queries of the observation window; 0 for none.
        seed: of the policy.
        k, v: [B, Hkv, L, D or Dv], as cached (keys rotated). None if not asked for.
        rows: float32 [B, Hkv, G, w, L], probabilities of the last w valid queries (0 where hidden, and for missing
            queries), or their masked, scaled logits (-inf where hidden) for a scorer that reads `logits`.
        statistics: float32 [B, Hkv, L] by name, of this call.
        h: [B, L, size], hidden states that the block's values are projected from. Only of the call's own tokens, so a
            scorer that reads them sees no others (L is S), and scores of older slots stay.
        q: [B, Hq, S, D], this call's queries before their rotation (RoPE, half-turned).
        turns: [2, 1 or B, S, D], cosines and sines that they are rotated by.
        at: the layer's number, from 0.
        stay: bool [B, Hkv, L], keys that the caller marked to keep.
        heads_before: KV heads of the layer that lie on ranks before this one, and are not among these.
    """

    pos: Tensor
    candidate: Tensor
    end: Tensor
    first: Tensor
    seen: Tensor
    budget: Tensor
    window: int
    seed: int
    k: Tensor | None
    v: Tensor | None
    rows: Tensor | None
    statistics: dict[str, Tensor]
    h: Tensor | None = None
    q: Tensor | None = None
    turns: Tensor | None = None
    at: int | None = None
    stay: Tensor | None = None
    heads_before: int = 0

    @property
    def keys(self) -> Tensor:
        """float32 [B, Hkv, L, D]"""
        return _asked(self.k, "keys").float()

    @property
    def values(self) -> Tensor:
        """float32 [B, Hkv, L, Dv]"""
        return _asked(self.v, "values").float()

    @property
    def hidden(self) -> Tensor:
        """float32 [B, L, size]"""
        return _asked(self.h, "hidden").float()

    @property
    def queries(self) -> Tensor:
        """float32 [B, Hkv, G, S, D]"""
        grouped: Tensor = _asked(self.q, "queries").float().unflatten(1, (self.pos.shape[1], -1))
        return grouped

    @property
    def angles(self) -> Tensor:
        """[2, 1 or B, S, D]"""
        return _asked(self.turns, "queries")

    @property
    def observed(self) -> Tensor:
        """float32 [B, Hkv, G, w, L]: `rows`"""
        return _asked(self.rows, "rows")

    @property
    def layer(self) -> int:
        """The site's layer, from 0."""
        return _asked(self.at, "layer")

    @property
    def marked(self) -> Tensor:
        """bool [B, Hkv, L]"""
        return _asked(self.stay, "marks")

    @property
    def before_window(self) -> Tensor:
        """bool [B, Hkv, L]: candidates that came before the observation window."""
        return self.candidate & (self.pos < self.end - self.window)


def _asked(value: Asked | None, word: str) -> Asked:
    """What a scorer reads.

    Raises:
        _Unsaid: it did not say so.
    """
    if value is None:
        raise _Unsaid(f"it reads {word!r} without saying so", f"register it with reads=({word!r}, ...)")
    return value


def mean_of(value: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dim but one of value [B, Hkv, L, D] where mask [B, Hkv, L]: [B, Hkv, 1, D]."""
    weight = mask[..., None].float()
    return (torch.where(weight > 0, value, 0.0)).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
