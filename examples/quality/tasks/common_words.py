"""The word that comes most often in a list: nothing to be looked up in one place, all of the list counts."""

from __future__ import annotations

import random
from dataclasses import replace

from quality.tasks.trial import Kind, Trial, Writer, question

OFTEN, ELSE, OTHERS = 12, 2, 9


def trial(writer: Writer, rng: random.Random) -> Trial:
    common, *rest = rng.sample(writer.words, min(OTHERS + 1, len(writer.words)))
    words = [common] * OFTEN + rest * ELSE
    rng.shuffle(words)
    listed = writer.encode("\nA list of words:\n" + ", ".join(words) + ".\n")
    said = "word that comes most often in the list of words"
    lead = "Of all words in the list, the one that comes most often is"
    asked = question(writer, f"What is the {said}?", lead, f" {common}")
    asked = replace(asked, rivals=[writer.encode(f" {word}") for word in rest])
    return Trial(writer.a_start(rng), [listed], [rng.uniform(0.05, 0.95)], {"common-words": asked})


KIND = Kind(
    "common-words",
    {"common-words": f"a list in which one word comes {OFTEN} times and {OTHERS} others {ELSE} times each."},
    trial,
)
