"""Tensor parallelism: which of a model's heads this process has, as its parameters and its config say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch

from kvpass.errors import ModelError
from kvpass.kernels.ranks import elsewhere
from kvpass.kernels.rule import Rule

TP = "tp"
"""The dimension of a device mesh along which heads are parted, as transformers calls it (`tp_plan`)."""


@dataclass(frozen=True)
class Sharded:
    """A process' part of a model whose layers are parted over ranks.

    Attributes:
        rank, ranks: which part, from 0, of how many.
        group: the name of the ranks' process group.
        heads: query heads and KV heads of layers, on all ranks together, as the config says; empty if unknown.
    """

    rank: int
    ranks: int
    group: str
    heads: frozenset[tuple[int, int]] = frozenset()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}"

    def parts(self, heads: int, kv_heads: int) -> bool | None:
        """Whether a layer with so many query and KV heads here has others elsewhere; None if that is not to be told, or
        if a KV head's query heads lie on several ranks.
        """
        whole = (heads, kv_heads) in self.heads
        part = (heads * self.ranks, kv_heads * self.ranks) in self.heads
        return part if whole != part else None


def sharded(model: torch.nn.Module) -> Sharded | None:
    """What part of a model this is; None for a whole one. Asks parameters for their device mesh: imports nothing.

    Raises:
        ModelError: its layers are parted too (pipeline parallelism).
    """
    mesh = next(_meshes(model), None)
    if mesh is None:
        return None
    if _size(getattr(model, "_device_mesh", None), "pp") > 1:
        raise ModelError(
            "this process has some of the model's layers only (pipeline parallelism)",
            where="kvpass.compile",
            hint="load it with tp_plan alone: kvpass counts layers from the first to the last",
        )
    group = mesh.get_group(TP)
    return Sharded(int(mesh.get_local_rank(TP)), group.size(), str(group.group_name), frozenset(_heads(model)))


def in_group(rule: str, group: str) -> str:
    """A rule's text with the process group of another run."""
    found = Rule.parse(rule)
    return found.replace(ranks_group=quote(group)).encode() if elsewhere(found) else rule


def _meshes(model: torch.nn.Module) -> Iterator[Any]:
    """Of parameters (DTensors) that are parted among ranks that run the same tokens."""
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if _size(mesh, TP) > 1:
            yield mesh


def _size(mesh: Any, dim: str) -> int:
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return int(mesh.size(names.index(dim))) if dim in names else 1


def _heads(model: torch.nn.Module) -> Iterator[tuple[int, int]]:
    """Query and KV heads of the layers, as transformers' configs call them."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    queries = heads if isinstance(heads, (list, tuple)) else [heads]
    keys = shared if isinstance(shared, (list, tuple)) else [shared]
    for q in queries:
        for kv in keys:
            if isinstance(q, int):
                yield q, kv if isinstance(kv, int) else q
