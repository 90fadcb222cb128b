"""The first three: a passkey, three keys and a chain of variables in one text, each a distraction for the others."""

from __future__ import annotations

import random

from quality.tasks.trial import DIGITS, Kind, Trial, Writer, line, number, question

TASKS = ("passkey", "multi-key", "variable")
NUMBERS = 5


def trial(writer: Writer, rng: random.Random) -> Trial:
    code, value, *numbers = [number(rng) for _ in range(NUMBERS)]
    keys = rng.sample(writer.words, len(numbers))
    single = [f"The access code of the vault is {code}. Remember it."]
    single += [f"The special magic number for {k} is {n}." for k, n in zip(keys, numbers, strict=True)]
    rng.shuffle(single)
    chain = [f"The value of x1 is {value}.", "The value of x2 is the value of x1."]
    chain.append("The value of x3 is the value of x2.")
    order = [single] * len(single) + [chain] * len(chain)
    rng.shuffle(order)
    queues = {id(single): iter(single), id(chain): iter(chain)}
    needles = [line(writer, next(queues[id(queue)])) for queue in order]
    asked = [
        ("What is the access code of the vault?", "The access code of the vault is ", code),
        (f"What is the special magic number for {keys[0]}?", f"The special magic number for {keys[0]} is ", numbers[0]),
        ("What is the value of x2?", "The value of x2 is ", value),
    ]
    depths = sorted(rng.uniform(0.05, 0.95) for _ in needles)
    questions = {task: question(writer, *words) for task, words in zip(TASKS, asked, strict=True)}
    return Trial(writer.a_start(rng), needles, depths, questions)


KIND = Kind(
    "needles",
    dict(
        zip(
            TASKS,
            (
                f"one number of {DIGITS} digits in the text.",
                "one of three numbers that have names.",
                "x1 is a number, x2 is x1, x3 is x2; asked for x2. In one text with the two before.",
            ),
            strict=True,
        )
    ),
    trial,
)
