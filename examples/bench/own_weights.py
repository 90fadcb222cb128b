"""Random weights and tables for the built-in policies that read some, so that each of them can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from kvpass.kernels.rank.scorers.registry import find_scorer, scorers

from kvpass.policy.policy import Policy


def weights(folder: Path, config: Any) -> Path:
    """A file with random tensors of every name and shape that docs/policy-files.md gives."""
    g = torch.Generator().manual_seed(0)
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
    dim, wide = size // config.num_attention_heads, 16
    shapes = {
        "q_filters": {"filters": (heads, dim)},
        "kvp": {"w1": (heads, wide, 2 * dim + 1), "b1": (heads, wide), "w2": (heads, wide), "b2": (heads,)},
        "gate": {"w1": (wide, size), "b1": (wide,), "w2": (heads, wide), "c": (heads,)},
        "surrogate": {"weight": (heads, size), "bias": (heads,)},
        "heads": {"heads": (heads,)},
    }
    for name, tensors in shapes.items():
        made = {key: torch.randn(layers, *shape, generator=g).abs() * 0.1 for key, shape in tensors.items()}
        torch.save(made, folder / f"{name}.pt")
    return folder


def with_files(name: str, folder: Path) -> dict[str, Any]:
    """The spec of a built-in policy, with a file where it needs one."""
    found = Policy.load(name)
    spec: dict[str, Any] = {"name": name, "extends": name}
    if found.score in scorers() and "file" in find_scorer(found.score).options:
        spec["options"] = {"file": str(folder / f"{found.score}.pt")}
    if found.allocate.heads == "table":
        spec["allocate"] = {"file": str(folder / "heads.pt")}
    return spec


def with_weights(name: str, folder: Path) -> Policy:
    """The policy, with a file where it needs one."""
    return Policy.load(with_files(name, folder))
