"""What is said while text comes token by token, and is needed later: eviction at decode steps, not of the prompt."""

from __future__ import annotations

import random
from dataclasses import replace

from quality.tasks.trial import Kind, Trial, Writer, line, number, question

STEPS, SAID_AFTER = 192, 24


def trial(writer: Writer, rng: random.Random) -> Trial:
    """The prompt is plain text and ends; the code is said soon after it, in STEPS tokens of other text."""
    code = number(rng)
    told = line(writer, f"The access code of the vault is {code}. Remember it.")
    text = writer.text(writer.a_start(rng), STEPS - len(told))
    asked = question(writer, "What is the access code of the vault?", "The access code of the vault is ", code)
    asked = replace(asked, steps=[*text[:SAID_AFTER], *told, *text[SAID_AFTER:]])
    return Trial(writer.a_start(rng), [], [], {"many-steps": asked})


KIND = Kind(
    "many-steps",
    {"many-steps": f"{STEPS} tokens come one by one after the prompt, a passkey among the first; then the question."},
    trial,
)
