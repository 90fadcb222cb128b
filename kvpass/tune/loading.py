"""A model and its tokenizer by name, for commands: the one place that imports a model library, and only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpass.errors import ModelError


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer), by transformers.

    Args:
        name: a folder, or what transformers finds by that name.
        device: as torch names it; `auto`: the first CUDA device, or the CPU.
        dtype: as torch names it; `auto`: that of the weights.

    Raises:
        ModelError: transformers is not installed, there is no such model, or it cannot be loaded.
    """
    import torch

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"transformers is not installed: {error}", hint='pip install "kvpass[hf]"') from error
    if not Path(name).is_dir() and _like_a_path(name):
        hint = "give the folder that save_pretrained wrote: config.json, weights and tokenizer"
        raise ModelError(f"no model folder {name!r}", where="MODEL", hint=hint)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    said: Any = logging
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
        return model.eval().to(place), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError) as error:
        line = next(iter(str(error).splitlines()), "")
        hint = "give a causal language model of transformers with its tokenizer, as a folder or by a name it knows"
        raise ModelError(f"cannot load {name!r}: {line}", where="MODEL", hint=hint) from error


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The text's tokens, and those that the tokenizer puts before every text."""
    tokens = list(tokenizer(text, add_special_tokens=False).input_ids)
    start = getattr(tokenizer, "bos_token_id", None)
    opened = list(tokenizer("a").input_ids)
    return tokens, [start] if start is not None and opened[:1] == [start] else []


def _like_a_path(name: str) -> bool:
    """A name on a hub has one slash at most, and begins with a letter or a digit."""
    return name.count("/") > 1 or not name[:1].isalnum() or name.endswith("/")
