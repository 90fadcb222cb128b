"""One request on its way: what was asked, how far it is, and what its client is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.admission import Need
from serving.errors import Refused
from serving.prefixes import Prefix
from serving.sampling import Sampler
from serving.words import Words


@dataclass(frozen=True)
class Asked:
    """A request in tokens, as checked."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is whole: `stop` (its end, or a stop sequence) or `length`."""

    reason: str
    tokens: int


Event = Piece | Done | Refused


@dataclass(eq=False)
class Request:
    """
    Attributes:
        tell: called by the engine's thread with every event; the last is `Done` or `Refused`.
        prefix: what its prompt begins with, if that is kept ready.
        fed: its tokens that its cache has seen.
        token: the one to be fed next.
        tokens: how many it has said.
        gone: its client is, so nobody listens.
    """

    asked: Asked
    words: Words
    tell: Callable[[Event], None]
    seconds: float
    prefix: Prefix | None = None
    fed: int = 0
    token: int = 0
    tokens: int = 0
    gone: bool = False
    came: float = field(default_factory=time.monotonic)
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.asked.temperature, self.asked.top_p, self.asked.seed)

    @property
    def need(self) -> Need:
        """What it will feed to the model at most: the last token is only said."""
        ready = len(self.prefix.ids) if self.prefix else 0
        calls = (ready, len(self.asked.prompt) - ready) if ready else (len(self.asked.prompt),)
        return Need(calls, self.asked.max_tokens - 1)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.came > self.seconds

    def say(self, logits: Any, ends: frozenset[int]) -> bool:
        """Choose the next token of its logits [V] and tell it; whether the answer is whole."""
        self.token = self.sampler(logits)
        self.tokens += 1
        over = self.token in ends
        text = "" if over else self.words.add(self.token)
        full = self.tokens >= self.asked.max_tokens
        stopped = over or self.words.stopped
        if stopped or full:
            text += self.words.end()
        stopped = stopped or self.words.stopped
        if text:
            self.tell(Piece(text))
        if stopped or full:
            self.tell(Done("stop" if stopped else "length", self.tokens))
        return stopped or full
