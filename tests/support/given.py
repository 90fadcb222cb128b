"""What the reader of a page has before its first snippet: names, and files in the working folder (see snippets.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def _module(path: str) -> Any:
    """A file of tests/ or examples/. tests/ must not be on sys.path: its folder kvpass would shadow the real one."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_and_inputs() -> dict[str, Any]:
    """A small random Llama, and what a tokenizer gives for a prompt of 400 tokens."""
    tiny = _module("tests/models/tiny.py")
    ids = tiny.tokens(1, 400)
    return {"model": tiny.llama(), "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}


def policy_files() -> dict[str, Any]:
    """Also probes, a prompt and an empty cache, and the file of a scorer of one's own."""
    from transformers import DynamicCache

    given = model_and_inputs()
    size = given["model"].config.hidden_size
    torch.save({"probes": torch.randn(32, size)}, "probes.pt")
    return {**given, "ids": given["inputs"]["input_ids"], "cache": DynamicCache()}


def policies() -> dict[str, Any]:
    Path("my_policy.yaml").write_text("name: my_policy\nextends: snapkv\n")
    return {}


def export() -> dict[str, Any]:
    """The step of examples/export_step.py, its first token and its empty caches, and tokens to feed."""
    sys.path.insert(0, str(ROOT / "examples"))
    example = _module("examples/export_step.py")
    past = [torch.zeros(1, example.KV_HEADS, 5, example.WIDTH // example.HEADS) for _ in range(4)]
    tokens = torch.randint(example.VOCABULARY, (100, 1, 1))
    names = dict(zip(("k0", "v0", "k1", "v1"), past, strict=True))
    return {"step": example.Step(example.Decoder().eval()), "ids": tokens[0], "tokens": tokens, **names}


GIVEN = {
    "README.md": model_and_inputs,
    "docs/cache.md": model_and_inputs,
    "docs/debugging.md": model_and_inputs,
    "docs/export.md": export,
    "docs/inner.md": model_and_inputs,
    "docs/patterns.md": model_and_inputs,
    "docs/policies.md": policies,
    "docs/policy-files.md": policy_files,
}
