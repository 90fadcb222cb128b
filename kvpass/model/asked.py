"""What a call of `generate` is asked for, by name."""

from __future__ import annotations

from typing import Any


class Asked:
    """One call's settings: what its keyword arguments leave out is taken from a generation config.

    Args:
        given: the call's keyword arguments.
    """

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.given, self.config = given, getattr(model, "config", None)
        self.configs = [c for c in (given.get("generation_config"), getattr(model, "generation_config", None)) if c]

    def __call__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return next((value for c in self.configs if (value := getattr(c, name, None)) is not None), None)
