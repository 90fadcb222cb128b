"""What a cache is, without a cache: for each row the calls that it has seen, and in which columns its tokens stand.

Every operation is a line of list handling. What a row keeps, and says, follows from its calls alone (`alone.py`), so a
row that was reordered, merged, cropped, forked, saved or interrupted must be what its calls make of an empty cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

Call = tuple[int, ...]
"""Token ids of one row in one call."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        calls: tokens of each call, without padding.
        columns: of its tokens, ascending.
        heard: logits [vocabulary] of the last token of each call; None where nobody listened.
    """

    calls: tuple[Call, ...] = ()
    columns: tuple[int, ...] = ()
    heard: tuple[torch.Tensor | None, ...] = field(default=(), compare=False, repr=False)

    def told(self, ids: Call, end: int, heard: torch.Tensor | None) -> Row:
        """A call whose tokens end in column end - 1."""
        columns = (*self.columns, *range(end - len(ids), end))
        return Row((*self.calls, ids), columns, (*self.heard, heard))

    def without(self, n: int) -> Row:
        """Before its last n calls, of one token each."""
        assert all(len(call) == 1 for call in self.calls[-n:])
        return Row(self.calls[:-n], self.columns[:-n], self.heard[:-n])

    def padded(self, n: int) -> Row:
        return replace(self, columns=tuple(column + n for column in self.columns))


@dataclass(frozen=True)
class Plain:
    """A cache of some rows.

    Attributes:
        width: columns, the logical length.
        loose: of the last columns, how many are tentative.
        steps: calls of one token since the last of several.
        cropped: since its last call; such a cache is not pickled or saved.
    """

    rows: tuple[Row, ...]
    width: int = 0
    loose: int = 0
    steps: int = 0
    cropped: bool = False

    def mask(self) -> torch.Tensor:
        """int64 [rows, width], 0 for padding."""
        found = torch.zeros(len(self.rows), self.width, dtype=torch.long)
        for b, row in enumerate(self.rows):
            found[b, list(row.columns)] = 1
        return found

    def told(self, words: list[Call], heard: list[torch.Tensor] | None = None, loose: int = 0) -> Plain:
        """A call of as many tokens as the longest of `words` has; others are padded on the left."""
        width = max(map(len, words))
        said = heard or [None] * len(words)
        rows = tuple(
            row.told(ids, self.width + width, one) for row, ids, one in zip(self.rows, words, said, strict=True)
        )
        steps = self.steps + 1 if width == 1 and self.width else 0
        return Plain(rows, self.width + width, loose, steps)

    def without(self, n: int) -> Plain:
        rows = tuple(row.without(n) for row in self.rows)
        return Plain(rows, self.width - n, self.loose - n, self.steps - n, cropped=True)

    def picked(self, rows: list[int]) -> Plain:
        return replace(self.made(), rows=tuple(self.rows[at] for at in rows))

    def made(self) -> Plain:
        """Another cache of these rows, whose tokens are settled."""
        return replace(self, loose=0, cropped=False)

    def beside(self, other: Plain) -> Plain:
        """The rows of both, all of which end in the same column."""
        width = max(self.width, other.width)
        rows = (row.padded(width - one.width) for one in (self, other) for row in one.rows)
        longest = self if self.width == width else other
        return Plain(tuple(rows), width, 0, longest.steps)
