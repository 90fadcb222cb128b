"""A table of keys and values, of which one value is asked for: every row looks as important as any other."""

from __future__ import annotations

import random

from quality.tasks.trial import Kind, Trial, Writer, number, question

ROWS = 5


def trial(writer: Writer, rng: random.Random) -> Trial:
    keys = rng.sample(writer.words, ROWS)
    values = [number(rng) for _ in keys]
    rows = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    at = rng.randrange(ROWS)
    said = f"the value of {keys[at]} in the table"
    asked = question(writer, f"What is {said}?", f"T{said[1:]} is ", values[at])
    table = writer.encode(f"\nA table of values:\n{rows}\n")
    return Trial(writer.a_start(rng), [table], [rng.uniform(0.05, 0.95)], {"lookup": asked})


KIND = Kind("lookup", {"lookup": f"one value of a table of {ROWS} keys of two words."}, trial)
