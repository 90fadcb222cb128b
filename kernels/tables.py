"""Tables from files: `torch.save` of a dict of tensors, the first dimension of each is the layer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from kvpass.kernels.errors import TableError
from torch import Tensor


def layer_of(path: str, name: str, layer: int, device: torch.device) -> Tensor:
    """One layer of a stacked tensor of a file, float32.

    Raises:
        TableError: no such tensor, or not for so many layers.
    """
    table = _read(path, Path(path).stat().st_mtime)
    if name not in table or layer >= len(table[name]):
        held = {key: list(value.shape) for key, value in table.items()}
        raise TableError(f"{path}: no {name!r} for layer {layer}", f"it holds {held}; give a file made for this model")
    return table[name][layer].float().to(device)


@lru_cache(maxsize=8)
def _read(path: str, changed: float) -> dict[str, Tensor]:
    """`changed`: the file's time of change, so that a new one is read again."""
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded
