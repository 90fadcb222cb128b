"""Under `strict=False`: one graph in several forms, by which of its caches are compressed and which hold data.

A prompt may have run dense, or partly so, or in a model that kvpass did not compile; its caches are tensors of data,
and whatever is done with them later is done as the model wrote it. Sites whose caches kvpass made go on compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from kvpass.runtime.binding import Binding
from kvpass.runtime.identity import Origin
from kvpass.runtime.left import Marking, left_by
from kvpass.runtime.shell import is_data

Form = Callable[..., Any]


class Forms:
    """What a kvpass backend hands to Dynamo for a graph that may be given caches of data.

    Attributes:
        bindings: of all sites that can be rewritten.
        build: the graph without those of them that are to stay as they are; and whether it is the first form.
        marking: tells buffers that the model's own attention wrote to.
    """

    def __init__(
        self, bindings: Sequence[Binding], build: Callable[[frozenset[int], bool], Form], origin: Origin
    ) -> None:
        self.bindings, self.build, self.marking = tuple(bindings), build, Marking(origin)
        self.forms: dict[frozenset[int], Form] = {}

    def of(self, args: Sequence[Any]) -> Form:
        """The form for a call's caches, made if it is the first of its kind."""
        dense = frozenset(at for at, one in enumerate(self.bindings) if _holds_data(one, args))
        if dense not in self.forms:
            self.forms[dense] = self.build(dense, not self.forms)
        return self.forms[dense]

    def __call__(self, *args: Any) -> Any:
        return self.marking.run(self.of(args), args)


def _seen_dense(buffer: torch.Tensor) -> bool:
    """Whether a graph that kvpass left as it is wrote into a buffer. Others may be copies of one that stands for a
    compressed cache, in which nobody writes keys.
    """
    return any(left_by(t) is not None for t in (buffer, buffer._base) if t is not None)


def _holds_data(binding: Binding, args: Sequence[Any]) -> bool:
    """Was a site given a cache that kvpass did not make?"""
    if binding.past is None:
        return False
    past = [args[at] for at in binding.past]
    if any(type(tensor) is FakeTensor for tensor in past):
        return False
    if "L" in binding.sizes:
        start = binding.start(args) if binding.start is not None else 0
        if isinstance(start, torch.Tensor):
            start = start.reshape(-1)[:1].tolist()[0]
        ours = zip(past, binding.paths, strict=True)
        return bool(start) and all(is_data(t, path) and _seen_dense(t) for t, path in ours)
    axis = binding.layouts[0].token_axis
    return past[0].shape[axis] > 0 and all(is_data(tensor) for tensor in past)
