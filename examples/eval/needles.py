"""Documents for lm-evaluation-harness without a hub: a number hidden in the text of Python's own documentation."""

from __future__ import annotations

import random
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset

CHARS, DOCUMENTS, CHOICES, SEED = 4000, 50, 4, 0
"""Characters of a text (about 1,000 tokens), how many texts, numbers to choose from."""


def document(rng: random.Random, whole: str) -> dict[str, Any]:
    numbers = [str(rng.randrange(10000, 100000)) for _ in range(CHOICES)]
    start, depth = rng.randrange(len(whole) // 2), rng.uniform(0.1, 0.8)
    text = whole[start : start + CHARS]
    cut = text.index("\n", int(depth * CHARS)) + 1
    told = f"\nThe access code of the vault is {numbers[0]}. Remember it.\n\n"
    choices = sorted(numbers)
    return {
        "text": text[:cut] + told + text[cut:],
        "answer": numbers[0],
        "choices": choices,
        "label": choices.index(numbers[0]),
    }


def documents(**_: Any) -> dict[str, Dataset]:
    """What a task's `custom_dataset` gives: the same texts in each run."""
    rng, whole = random.Random(SEED), "\n\n".join(topics[name] for name in sorted(topics))
    return {"test": Dataset.from_list([document(rng, whole) for _ in range(DOCUMENTS)])}
