"""A model that shares every parameter and buffer with another, and nothing else: neither compiled state nor caches."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def twin(model: M) -> M:
    """A copy of the module tree around the same tensors.

    Modules that keep their cache in attributes must not hand it to the original. A model that Python cannot copy (a
    lock or a generator in an attribute) gets a copy of its outermost module only.
    """
    tensors: chain[Any] = chain(model.parameters(), model.buffers())
    shared = {id(tensor): tensor for tensor in tensors}
    try:
        result = copy.deepcopy(model, shared)
    except Exception:
        result = copy.copy(model)
    result._compiled_call_impl = None
    return result
