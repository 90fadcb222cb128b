"""Tables from files: `torch.save` of a dict of tensors, the first dimension of each is the layer.

A file may come from anywhere: only tensors are ever loaded, and what is wrong with it is said by its name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from kvpass.kernels.errors import TableError
from torch import Tensor

HEADS = {"heads": "layers Hkv"}
"""What a table of shares holds: >= 0, of each layer one above 0."""

_SAVE = "make it by torch.save of a dict of tensors"


def layer_of(path: str, name: str, layer: int, device: torch.device) -> Tensor:
    """One layer of a stacked tensor of a file, float32.

    Raises:
        TableError: it cannot be read, or holds no such tensor, or not for so many layers.
    """
    table = read_table(path)
    if name not in table or layer >= len(table[name]):
        raise TableError(f"{path}: no {name!r} for layer {layer}", f"it holds {_held(table)}; give this model's file")
    part: Tensor = table[name][layer].float().to(device)
    return part


def read_table(path: str) -> dict[str, Any]:
    """What a file holds; read again if it has changed.

    Raises:
        TableError: it cannot be read, is no file of `torch.save`, or holds more than tensors and plain data.
    """
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}", "give an existing file") from None


def check_table(path: str, wanted: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> None:
    """Whether a file holds the tensors of a scorer, or of a table of shares.

    Args:
        wanted: by name, the letters of a tensor's dims, e.g. `layers Hkv D`; equal letters are equal sizes, and
            `D+Dv+1` is a sum.
        sizes: of the model, by letter.

    Raises:
        TableError: naming the file, the tensor, and what is wrong with it.
    """
    table = read_table(path)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise TableError(f"{path}: no tensor {missing[0]!r}", f"it holds {_held(table)}; wanted: {_listed(wanted)}")
    for name in wanted:
        _check_values(path, name, table[name])
    known: dict[str, tuple[int, str]] = {letter: (n, "the model") for letter, n in (sizes or {}).items()}
    for name, letters in wanted.items():
        _check_dims(path, name, table[name], letters.split(), known)


def _check_values(path: str, name: str, value: Any) -> None:
    """A dense tensor of finite numbers."""
    fix = f"{name!r} is a dense tensor of finite floats"
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    if not dense or value.is_meta:
        kind = f"a {value.device.type} tensor, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TableError(f"{path}: {name!r} is {kind}", fix)
    shares = name in HEADS and not value.is_complex()
    if not (value.is_floating_point() or shares):
        raise TableError(f"{path}: {name!r} is of dtype {str(value.dtype).removeprefix('torch.')}", fix)
    bad = int((~value.float().isfinite()).sum())
    if bad:
        raise TableError(f"{path}: {name!r} holds {bad} of {value.numel()} numbers that are NaN or infinite", fix)
    if shares and value.dim() == 2 and not bool(((value >= 0).all(-1) & (value.float().sum(-1) > 0)).all()):
        layer = int((~((value >= 0).all(-1) & (value.float().sum(-1) > 0))).nonzero()[0])
        what = f"{path}: {name!r} of layer {layer} is {value[layer].tolist()}"
        raise TableError(what, "give shares >= 0 for each layer, one of them above 0")


def _check_dims(path: str, name: str, value: Tensor, letters: list[str], known: dict[str, tuple[int, str]]) -> None:
    """Sizes against the letters seen so far, and those of this tensor added to them."""
    shape = f"{name!r} is {list(value.shape)}"
    if value.dim() != len(letters) or not value.numel():
        raise TableError(f"{path}: {shape}", f"it is [{', '.join(letters)}]")
    for letter, size in zip(letters, value.shape, strict=True):
        total, whose = _size(letter, known)
        if total is not None and total != size:
            fix = f"give a file made for this model, whose rewritten layers count: {name!r} is [{', '.join(letters)}]"
            raise TableError(f"{path}: {shape}, so {letter} is {size}, but {total} in {whose}", fix)
        known.setdefault(letter, (size, repr(name)))


def _size(letter: str, known: dict[str, tuple[int, str]]) -> tuple[int | None, str]:
    """What a letter, or a sum of letters and numbers, must be; None if that is not known yet."""
    if letter in known:
        return known[letter]
    parts = letter.split("+")
    if len(parts) > 1 and all(part in known or part.isdigit() for part in parts):
        return sum(known[part][0] if part in known else int(part) for part in parts), "the model"
    return None, ""


def _held(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for key, v in table.items()}


def _listed(wanted: Mapping[str, str]) -> str:
    return ", ".join(f"{name} [{', '.join(letters.split())}]" for name, letters in wanted.items())


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> dict[str, Any]:
    """`changed`: the file's time of change, so that a new one is read again."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # never runs what a pickle says
    except OSError:
        raise
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if named is None:
            raise TableError(f"{path}: no file of torch.save, or one that says more than tensors", _SAVE) from None
        what = f"{path}: holds more than tensors: {named[1] or named[2]}, which kvpass never runs"
        raise TableError(what, f"{_SAVE}, and trust no file that asks for more") from None
    except Exception as error:  # junk can fail in any way
        why = "it is empty" if isinstance(error, EOFError) else " ".join(str(error).split()[:9]) or type(error).__name__
        raise TableError(f"{path}: no file of torch.save ({why})", _SAVE) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise TableError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors by name", _SAVE)
    return loaded
