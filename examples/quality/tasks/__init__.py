"""Kinds of texts and the questions about them: what `make quality` judges answers by. One file for each kind."""

from __future__ import annotations

from quality.tasks import chain, common_words, copying, hard_needle, instructions, lookup, many_steps, needles, secret
from quality.tasks.trial import Kind

KINDS: tuple[Kind, ...] = (
    needles.KIND,
    hard_needle.KIND,
    chain.KIND,
    common_words.KIND,
    lookup.KIND,
    copying.KIND,
    instructions.KIND,
    secret.KIND,
    many_steps.KIND,
)
"""In the order of the tables' columns; the first is what is measured where no task is named."""

TASKS: dict[str, Kind] = {task: kind for kind in KINDS for task in kind.tasks}
"""The kind of text that each task asks about."""

DEFAULT: tuple[str, ...] = needles.TASKS


def named(text: str) -> tuple[str, ...]:
    """The tasks of `all`, or of names with commas, in the tables' order.

    Raises:
        ValueError: there is no such task.
    """
    names = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(names - {*TASKS, "all"})
    if unknown or not names:
        raise ValueError(f"no task {unknown[0] if unknown else text!r}; there are all, {', '.join(TASKS)}")
    return tuple(task for task in TASKS if "all" in names or task in names)


def kinds_of(tasks: tuple[str, ...]) -> list[Kind]:
    """The texts that some tasks need, each once."""
    return [kind for kind in KINDS if any(task in tasks for task in kind.tasks)]
