"""A number whose name is hard to tell from others: names of two words, of which the others have one each."""

from __future__ import annotations

import random

from quality.tasks.trial import Kind, Trial, Writer, line, number, question

NEEDLES = 3


def trial(writer: Writer, rng: random.Random) -> Trial:
    """One other name shares the first word, one the second."""
    first, second, *others = rng.sample(writer.words, 4)
    names = [(first, second), (first, others[0]), (others[1], second)]
    numbers = [number(rng) for _ in names]
    told = [f"The special magic number for {a} {b} is {n}." for (a, b), n in zip(names, numbers, strict=True)]
    rng.shuffle(told)
    depths = sorted(rng.uniform(0.05, 0.95) for _ in told)
    said = f"special magic number for {first} {second}"
    asked = question(writer, f"What is the {said}?", f"The {said} is ", numbers[0])
    return Trial(writer.a_start(rng), [line(writer, words) for words in told], depths, {"hard-needle": asked})


KIND = Kind(
    "hard-needle", {"hard-needle": f"one of {NEEDLES} numbers; each name shares a word with the one asked for."}, trial
)
