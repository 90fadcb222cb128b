"""What was proved of a mask, as a record."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Visibility:
    """What was proved of a mask: a query at position p sees the key in column k if all that is set here says so.

    Attributes:
        causal: k <= p.
        corner: k <= the query's place in its call, instead.
        window: above 0: k > p - window.
        chunk: above 0: k // chunk == p // chunk.
        mean: numbers hide, not truths: a query that sees nothing gets the mean of all values.
        tokens: [1 or B, T], not 0 where a column holds a token; None: everywhere.
        read: places of the mask's parts that were not proved: they stay tensors.
        why: for each of these that differs from query to query, what is not known.
    """

    causal: bool = False
    corner: bool = False
    window: int = 0
    chunk: int = 0
    mean: bool = False
    tokens: fx.Node | None = None
    read: tuple[int, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """As ops take them (`kvpass.kernels.attention.visibility.Sees`)."""
        flags = [word for word in ("causal", "corner") if getattr(self, word)]
        sizes = [f"{word}={getattr(self, word)}" for word in ("window", "chunk") if getattr(self, word)]
        return " ".join(flags + sizes + ["mean"] * self.mean)

    def __str__(self) -> str:
        """For people: `causal window=4096 tokens`; `causal, and adds a tensor by key` (a part that is the same for all
        queries); `all, and reads a mask (what is not known)`.
        """
        said = " ".join(filter(None, [self.words, "tokens" * (self.tokens is not None)])) or "all"
        said += ", and adds a tensor by key" if len(self.read) > len(self.why) else ""
        return f"{said}, and reads a mask ({'; '.join(self.why)})" if self.why else said
