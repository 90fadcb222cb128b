"""The real models that examples and measurements can take, by name: `model, tokenizer = load("gemma")`."""

from __future__ import annotations

from typing import Any

import gemma
import smollm2

LOAD = {"smollm2": smollm2.load, "gemma": gemma.load}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}


def load(name: str) -> tuple[Any, Any]:
    """(model in eval mode, float32, tokenizer)."""
    return LOAD[name]()
