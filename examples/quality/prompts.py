"""Prompts of exact length in tokens: real text with a task's needles in it, and plain text to go on with.

The same seed, context and trial give the same text, needles and depths, whatever the policy: results are paired.
"""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

import smollm2

from quality.tasks.needles import KIND
from quality.tasks.trial import Kind, Trial

MODES = ("aware", "agnostic")
WORDS = (
    "river castle garden silver lemon tiger falcon dragon harbor island meadow copper marble forest rocket candle"
    " window bridge tower valley desert ocean planet pepper rabbit eagle wolf horse lion snake pearl amber mountain"
)
SENTINEL = "@@"
TEXT_CHARS = 464_000


class Prompts:
    """Makes prompts with one tokenizer (anything that encodes, decodes and may have a chat template)."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.head, self.tail = map(self.encode, self._around([]))

    def _around(self, before: list[dict[str, str]]) -> list[str]:
        """What the chat's template writes in front of a user's words and behind them; of a model that is no assistant,
        its first token and a line.
        """
        if getattr(self.tokenizer, "chat_template", SENTINEL) is None:
            said = "".join(f"{one['content']}\n" for one in before)
            return [f"{self.tokenizer.bos_token}{said}", "\n"]
        chat = [*before, {"role": "user", "content": SENTINEL}]
        whole: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return whole.split(SENTINEL)

    def head_with(self, system: str, *turns: tuple[str, str]) -> list[int]:
        """The chat up to the user's words, with a system prompt, and turns of both before."""
        before = [{"role": "system", "content": system}]
        for user, assistant in turns:
            before += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return self.encode(self._around(before)[0])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def words(self) -> list[str]:
        """Names for the keys that all take as many tokens, so that rows of a batch are of equal length."""
        size = len(self.encode(" river"))
        return [word for word in WORDS.split() if len(self.encode(" " + word)) == size]

    def trial(self, context: int, index: int, kind: Kind = KIND) -> Trial:
        """Text and questions of a kind. What the first kind writes has been as it is since there was no other."""
        own = "" if kind is KIND else f"-{kind.name}"
        return kind.trial(self, random.Random(f"{self.seed}-{context}-{index}{own}"))

    def a_start(self, rng: random.Random) -> int:
        """Where in the real text something may begin."""
        return rng.randrange(TEXT_CHARS // 2)

    def document(self, trial: Trial, context: int, closing: list[int]) -> list[int]:
        """Exactly `context` tokens: the chat's head, text with the needles in it, `closing`."""
        head = self.head if trial.head is None else trial.head
        room = context - len(head) - len(closing) - sum(map(len, trial.needles))
        if room < 0:
            raise ValueError(f"{context} tokens have no room for what is asked about: {-room} more are needed")
        body, out, last = self.text(trial.start, room), list(head), 0
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

    def prose(self, start: int, length: int) -> list[int]:
        """The same text in one line: no spaces at ends of lines, which a model would not say again."""
        words = self.tokenizer.decode(self.text(start, 2 * length)).split()
        return self.encode(" " + " ".join(words))[:length]

    def plain(self, context: int, index: int, extra: int) -> list[int]:
        """`context` + `extra` tokens of text without needles, the chat's head not counted in `extra`."""
        rng = random.Random(f"{self.seed}-{context}-{index}-text")
        return [*self.head, *self.text(rng.randrange(TEXT_CHARS // 2), context - len(self.head) + extra)]
