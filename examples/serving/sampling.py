"""The next token of one request: of its own logits and its own random numbers, whoever else is in the batch."""

from __future__ import annotations

import torch


class Sampler:
    """
    Args:
        temperature: 0: the likeliest token.
        top_p: of the likeliest tokens that together have this probability.
        seed: of the random numbers; None: any.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.random = torch.Generator()
        if seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """logits: [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits.to("cpu", torch.float64) / self.temperature).softmax(-1)
        chances, tokens = chances.sort(descending=True, stable=True)
        chances = chances * (chances.cumsum(-1) - chances < self.top_p)
        return int(tokens[torch.multinomial(chances, 1, generator=self.random)])
