"""Variable tracking over a longer chain, beside a second chain that starts from another number."""

from __future__ import annotations

import random

from quality.tasks.trial import Kind, Trial, Writer, line, number, question

LINKS = 4


def trial(writer: Writer, rng: random.Random) -> Trial:
    value, other = number(rng), number(rng)
    chains = [chain("x", value), [f"The value of y1 is {other}."]]
    order = [0] * LINKS + [1]
    rng.shuffle(order)
    queues = [iter(one) for one in chains]
    told = [line(writer, next(queues[which])) for which in order]
    depths = sorted(rng.uniform(0.05, 0.95) for _ in told)
    asked = question(writer, f"What is the value of x{LINKS}?", f"The value of x{LINKS} is ", value)
    return Trial(writer.a_start(rng), told, depths, {"long-chain": asked})


def chain(letter: str, value: str) -> list[str]:
    links = [f"The value of {letter}{at + 1} is the value of {letter}{at}." for at in range(1, LINKS)]
    return [f"The value of {letter}1 is {value}.", *links]


KIND = Kind(
    "long-chain",
    {"long-chain": f"x1 is a number, each next one is the one before; asked for x{LINKS}. A chain of y as well."},
    trial,
)
