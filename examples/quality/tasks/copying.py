"""A passage that is to be said again word for word: many tokens far from the end, all of them needed."""

from __future__ import annotations

import random

from quality.tasks.trial import Kind, Question, Trial, Writer

TOKENS, GIVEN = 32, 8


def trial(writer: Writer, rng: random.Random) -> Trial:
    """The passage is real text of another place; its first tokens are the start of the answer."""
    passage = writer.prose(writer.a_start(rng), TOKENS)
    note = [*writer.encode("\nThe note says:"), *passage, *writer.encode("\nHere the note ends.\n")]
    asked = writer.encode("\n\nRepeat the note word for word.")
    lead = [*writer.tail, *writer.encode("The note says:"), *passage[:GIVEN]]
    repeated = Question(asked, lead, passage[GIVEN:])
    return Trial(writer.a_start(rng), [note], [rng.uniform(0.05, 0.95)], {"copy": repeated})


KIND = Kind("copy", {"copy": f"{TOKENS - GIVEN} tokens of a note, after its first {GIVEN}."}, trial)
