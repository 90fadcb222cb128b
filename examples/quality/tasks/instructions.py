"""Two instructions in front of a long text, which must both still hold after it: the share of them that is followed.

After The Pitfalls of KV Cache Compression (arXiv 2510.00231), where some instructions are lost long before others. The
chat has one turn in which both were followed: a small model follows a rule better than it understands one.
"""

from __future__ import annotations

import random

from quality.tasks.trial import Kind, Trial, Writer, question

FIRST, SECOND = "first-rule", "second-rule"


def trial(writer: Writer, rng: random.Random) -> Trial:
    begin, end = rng.sample(writer.words, 2)
    rules = f"Follow two rules in each answer. Rule 1: begin with the words By the {begin}. "
    rules += f"Rule 2: sign with the words Signed: {end}."
    shown = f"By the {begin}: two and two is four. Signed: {end}."
    head = writer.head_with(rules, ("What is two and two?", shown))
    asked = "What is the text above about?"
    answer = f"By the {begin}: the text is about Python. Signed:"
    return Trial(
        writer.a_start(rng),
        [],
        [],
        {
            FIRST: question(writer, asked, "By the", f" {begin}"),
            SECOND: question(writer, asked, answer, f" {end}"),
        },
        head,
    )


KIND = Kind(
    "instructions",
    {
        FIRST: "the system prompt says how to begin an answer and how to sign it: how it begins.",
        SECOND: "how it is signed.",
    },
    trial,
)
