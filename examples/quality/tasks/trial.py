"""What a task is made of: a kind of text, and questions about it whose answers are known tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

DIGITS = 5


class Writer(Protocol):
    """What a kind of text needs to write its trials: `quality.prompts.Prompts`."""

    @property
    def words(self) -> list[str]: ...

    @property
    def tail(self) -> list[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def head_with(self, system: str, *turns: tuple[str, str]) -> list[int]: ...

    def a_start(self, rng: random.Random) -> int: ...

    def text(self, start: int, length: int) -> list[int]: ...

    def prose(self, start: int, length: int) -> list[int]: ...


@dataclass(frozen=True)
class Question:
    """One question as tokens. All questions of a task are of equal lengths, so that trials share a batch.

    Attributes:
        asked: what is asked.
        lead: the turn of the assistant, with the start of the answer that is given.
        gold: the rest of the answer. Right, if each of its tokens is the most likely one after those before it, which
            is what greedy decoding would say.
        rivals: other answers. Where there are any, right means that `gold` is likelier than each of them, a token.
        steps: tokens that are fed one by one between the prompt and what follows.
    """

    asked: list[int]
    lead: list[int]
    gold: list[int]
    rivals: Sequence[list[int]] = ()
    steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """One text and its questions.

    Attributes:
        start: character of the real text that the prompt is filled with.
        needles: what stands in it, as tokens.
        depths: where in the text each needle stands, as shares of it, ascending.
        questions: by task.
        head: the chat up to the user's words, where it is not the plain one.
    """

    start: int
    needles: list[list[int]]
    depths: list[float]
    questions: dict[str, Question]
    head: list[int] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of text: the tasks that are asked about it, each with a sentence, and what writes a trial of it."""

    name: str
    tasks: Mapping[str, str]
    trial: Callable[[Writer, random.Random], Trial]


def question(writer: Writer, asked: str, lead: str, gold: str) -> Question:
    """Of words; between `lead` and `gold` no space is added."""
    return Question(writer.encode(f"\n\n{asked}"), [*writer.tail, *writer.encode(lead)], writer.encode(gold))


def number(rng: random.Random) -> str:
    """Digits without a zero: tokenizers that take digits one by one give all numbers the same length."""
    return "".join(str(rng.randrange(1, 10)) for _ in range(DIGITS))


def line(writer: Writer, words: str) -> list[int]:
    """A needle: lines of their own."""
    return writer.encode(f"\n{words}\n")
