"""Text of tokens as they come: whole characters only, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes where a character's last bytes are still to come."""


class Words:
    """
    Attributes:
        stopped: a stop sequence came: nothing else does.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # decoded together with their successors; those already given
        self._held = ""  # may be the beginning of a stop sequence

    def add(self, token: int) -> str:
        """What is certain now."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._checked(text)

    def end(self) -> str:
        """What was held back; behind a stop sequence nothing."""
        if self.stopped:
            return ""
        text = self._checked(self._new())
        return text if self.stopped else text + self._held

    def _new(self) -> str:
        """Tokenizers write a token otherwise at the beginning of a text: so its predecessors are decoded too."""
        before, now = self._decoded(self._ids[self._from : self._read]), self._decoded(self._ids[self._from :])
        return now[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _checked(self, new: str) -> str:
        text = self._held + new
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        most = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text
