"""Budgets that are shared out once a call of several tokens has passed all layers, for one row of the batch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from oracle.choice import Choice
from oracle.flat import counts, extras


def model(choices: list[list[Choice]], even: int, safeguard: Fraction) -> tuple[list[list[int]], list[list[int]]]:
    """(slots, slots above the even budget) of each head of each layer: the best of the whole model stay."""
    joined = [choice for layer in choices for choice in layer]
    kept = counts(joined, even, safeguard)
    return split(kept, choices), split(extras(kept, even), choices)


def preference(
    choices: list[list[Choice]], even: int, wanted: list[float], window: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The same where a layer's heads all get what the layer deserves, beside the window (CAKE)."""
    most = [max(len(choice.positions) for choice in layer) for layer in choices]
    sizes = [min(n, even) for n in most]
    if max(most) > even and even > window:
        total = (even - window) * len(choices)
        sizes = [int(share / sum(wanted) * total) for share in wanted]
        sizes = [min(size, n - window) for size, n in zip(sizes, most, strict=True)]
        left = total - sum(sizes)
        while left > 0 and any(size < n - window for size, n in zip(sizes, most, strict=True)):
            room = [at for at, n in enumerate(most) if sizes[at] < n - window]
            each = left // len(room)
            for at in room:
                more = min(each, most[at] - window - sizes[at]) if each else min(1, left)
                sizes[at], left = sizes[at] + more, left - more
        sizes = [size + window for size in sizes]
    kept = [[min(size, len(c.positions)) for c in layer] for size, layer in zip(sizes, choices, strict=True)]
    joined = [count for layer in kept for count in layer]
    return kept, split(extras(joined, even), choices)


def threshold(choices: list[Choice], even: int, cut: float) -> list[int]:
    """Slots of each head: what reaches the threshold or is protected, up to the budget."""
    reached = [int(np.sum(choice.protected | (choice.score >= cut))) for choice in choices]
    return [min(even, max(n, len(choice.positions) > 0)) for n, choice in zip(reached, choices, strict=True)]


def split(flat: list[int], like: list[list[Choice]]) -> list[list[int]]:
    rest = list(flat)
    return [[rest.pop(0) for _ in layer] for layer in like]
