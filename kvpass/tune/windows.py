"""Windows of a text, as tokens: what is compressed, what comes after it, and which passages are read again.

The last quarter of the text is held out: nothing is chosen by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpass.errors import PolicyError

SHORTEST = 128
"""Tokens of a prompt below which a budget says little."""

DEPTHS = (0.1, 0.38, 0.66)
"""Where in its prompt the first passage of three windows in a row begins; the second lies half a prompt away."""

SEARCHED, HELD_OUT = 6, 6
"""Windows, at most."""


@dataclass(frozen=True)
class Window:
    """One prompt and three texts that follow it, each in the place of the others.

    Attributes:
        name: `search 3` or `held-out 1`.
        prompt: T tokens, which are compressed.
        next: S tokens, the text's own continuation.
        passages: two passages of the prompt, S tokens each, that are read again.
    """

    name: str
    prompt: tuple[int, ...]
    next: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Windows:
    """Disjoint windows.

    Attributes:
        search: those that policies are chosen by.
        held_out: those of the last quarter of the text.
        context, after: T and S.
        cue: so many tokens of a passage are given before it is judged.
    """

    search: tuple[Window, ...]
    held_out: tuple[Window, ...]
    context: int
    after: int

    @property
    def cue(self) -> int:
        return self.after // 4


def windows_of(tokens: Sequence[int], context: int, after: int = 64, head: Sequence[int] = ()) -> Windows:
    """Cut a text into windows of equal length, spread over it.

    Args:
        tokens: the whole text.
        context: tokens of a prompt; shorter texts get shorter prompts, of `SHORTEST` tokens at least.
        after: tokens that follow a prompt.
        head: tokens that every prompt begins with, counted in `context`, such as the one for the start of a text.

    Raises:
        PolicyError: the text is too short for two windows to choose by and two to report.
    """
    most = (len(tokens) // 5) - after  # 4 windows, and what their places lose by rounding
    context = min(context, most)
    if context < SHORTEST:
        needed = 5 * (SHORTEST + after)
        what = f"the text has {len(tokens):,} tokens, too few for windows of {SHORTEST} and {after} more"
        raise PolicyError(what, where="--text", hint=f"give a text of {needed:,} tokens or more, of the kind you serve")
    edge = len(tokens) - max(len(tokens) // 4, 2 * (context + after))
    ends = ((0, edge, "search", SEARCHED), (edge, len(tokens), "held-out", HELD_OUT))
    search, held_out = (_spread(tokens, *end, context, after, tuple(head)) for end in ends)
    return Windows(search, held_out, context, after)


def _spread(
    tokens: Sequence[int], begin: int, end: int, name: str, most: int, context: int, after: int, head: tuple[int, ...]
) -> tuple[Window, ...]:
    size = context + after
    number = min(most, (end - begin) // size)
    stride = (end - begin - size) // max(1, number - 1)
    starts = [begin + i * stride for i in range(number)]
    parts = [tuple(tokens[start : start + size]) for start in starts]
    return tuple(_window(part, i, name, context, after, head) for i, part in enumerate(parts))


def _window(part: tuple[int, ...], index: int, name: str, context: int, after: int, head: tuple[int, ...]) -> Window:
    prompt = (*head, *part[: context - len(head)])
    room, first = context - after, DEPTHS[index % len(DEPTHS)]
    places = [int(room * (first + shift) % room) for shift in (0.0, 0.5)]
    passages = tuple(prompt[at : at + after] for at in places)
    begin = context - len(head)
    return Window(f"{name} {index + 1}", prompt, part[begin : begin + after], passages)
