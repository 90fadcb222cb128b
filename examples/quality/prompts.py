"""Prompts of exact length in tokens: real text with needles in it, questions about them, and plain text to go on with.

The same seed, context and trial give the same text, needles and depths, whatever the policy: results are paired.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import smollm2

TASKS = ("passkey", "multi-key", "variable")
MODES = ("aware", "agnostic")
DIGITS = 5
WORDS = (
    "river castle garden silver lemon tiger falcon dragon harbor island meadow copper marble forest rocket candle"
    " window bridge tower valley desert ocean planet pepper rabbit eagle wolf horse lion snake pearl amber mountain"
)
SENTINEL = "@@"
TEXT_CHARS = 464_000


@dataclass(frozen=True)
class Question:
    """One question as tokens: what is asked, the start of the answer that is given, and the digits to be found."""

    asked: list[int]
    lead: list[int]
    gold: list[int]


@dataclass(frozen=True)
class Trial:
    """Needles and questions of one trial; `depths` is where in the text each needle stands, ascending."""

    start: int
    needles: list[list[int]]
    depths: list[float]
    questions: dict[str, Question]


class Prompts:
    """Makes prompts with one tokenizer (anything that encodes, decodes and may have a chat template)."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        head, tail = self._around()
        self.head, self.tail = self.encode(head), self.encode(tail)

    def _around(self) -> list[str]:
        """What stands before and after a user's words; of a model that is no assistant, its first token and a line."""
        if getattr(self.tokenizer, "chat_template", SENTINEL) is None:
            return [self.tokenizer.bos_token, "\n"]
        chat = [{"role": "user", "content": SENTINEL}]
        whole: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return whole.split(SENTINEL)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def words(self) -> list[str]:
        """Names for the keys that all take as many tokens, so that rows of a batch are of equal length."""
        size = len(self.encode(" river"))
        return [word for word in WORDS.split() if len(self.encode(" " + word)) == size]

    def trial(self, context: int, index: int) -> Trial:
        """Passkey, three keys and a chain of variables, in one text: each is a distraction for the others."""
        rng = random.Random(f"{self.seed}-{context}-{index}")
        code, value, *numbers = ["".join(str(rng.randrange(1, 10)) for _ in range(DIGITS)) for _ in range(5)]
        keys = rng.sample(self.words, len(numbers))
        single = [f"The access code of the vault is {code}. Remember it."]
        single += [f"The special magic number for {k} is {n}." for k, n in zip(keys, numbers, strict=True)]
        rng.shuffle(single)
        chain = [f"The value of x1 is {value}.", "The value of x2 is the value of x1."]
        chain.append("The value of x3 is the value of x2.")
        order = [single] * len(single) + [chain] * len(chain)
        rng.shuffle(order)
        queues = {id(single): iter(single), id(chain): iter(chain)}
        needles = [self.encode(f"\n{next(queues[id(queue)])}\n") for queue in order]
        questions = {
            "passkey": self._question("What is the access code of the vault?", "The access code of the vault is", code),
            "multi-key": self._question(
                f"What is the special magic number for {keys[0]}?",
                f"The special magic number for {keys[0]} is",
                numbers[0],
            ),
            "variable": self._question("What is the value of x2?", "The value of x2 is", value),
        }
        depths = sorted(rng.uniform(0.05, 0.95) for _ in needles)
        return Trial(rng.randrange(TEXT_CHARS // 2), needles, depths, questions)

    def _question(self, asked: str, lead: str, gold: str) -> Question:
        return Question(self.encode(f"\n\n{asked}"), [*self.tail, *self.encode(f"{lead} ")], self.encode(gold))

    def document(self, trial: Trial, context: int, closing: list[int]) -> list[int]:
        """Exactly `context` tokens: the chat's head, text with the needles in it, `closing`."""
        room = context - len(self.head) - len(closing) - sum(map(len, trial.needles))
        body, out, last = self.text(trial.start, room), list(self.head), 0
        for needle, depth in zip(trial.needles, trial.depths, strict=True):
            cut = max(last, self._line_end(body, int(depth * room)))
            out += body[last:cut] + needle
            last = cut
        return out + body[last:] + closing

    def _line_end(self, body: list[int], at: int) -> int:
        """The next end of a line from `at` on, so that no needle splits a sentence of the text's lines."""
        ends = (i + 1 for i in range(at, min(at + 60, len(body))) if "\n" in self.tokenizer.decode([body[i]]))
        return next(ends, at)

    def prompt(self, trial: Trial, context: int, mode: str, task: str | None) -> list[int]:
        """What is compressed: with the question at its end (aware), or without any (agnostic)."""
        return self.document(trial, context, trial.questions[task].asked if mode == "aware" and task else [])

    def follow_up(self, trial: Trial, mode: str, task: str) -> list[int]:
        """The second call: the turn of the assistant with the start of its answer; agnostic: first the question."""
        question = trial.questions[task]
        return question.lead if mode == "aware" else question.asked + question.lead

    def text(self, start: int, length: int) -> list[int]:
        """`length` tokens of real text from a paragraph near character `start` on."""
        start = smollm2.text(TEXT_CHARS).index("\n\n", start) + 2
        size = min(8 * length, TEXT_CHARS - start)
        tokens = self.encode(smollm2.text(size, start))[:length]
        if len(tokens) < length:
            raise ValueError(f"the text has no {length} tokens from character {start} on")
        return tokens

    def plain(self, context: int, index: int, extra: int) -> list[int]:
        """`context` + `extra` tokens of text without needles, the chat's head not counted in `extra`."""
        rng = random.Random(f"{self.seed}-{context}-{index}-text")
        return [*self.head, *self.text(rng.randrange(TEXT_CHARS // 2), context - len(self.head) + extra)]
