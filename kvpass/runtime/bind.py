"""The compiled callable: shells in, state out of them, compiled call, shells out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvpass.kernels.rule import Rule
from kvpass.runtime.shell import make, refuse, unwrap
from kvpass.runtime.store import Origin, SlotStore
from kvpass.terms import Layout, Phase

Size = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class Binding:
    """How one site's state reaches a compiled graph.

    Attributes:
        past: places of the past K and V among the graph's inputs; None in prefill.
        returned: places of the K and V caches among the graph's original outputs.
        sizes: B, Hkv, D, Dv and S of a call, read from the graph's inputs.
    """

    name: str
    layer: int
    phase: Phase
    rule: Rule
    layouts: tuple[Layout, Layout]
    past: tuple[int, int] | None
    returned: tuple[tuple[int, ...], tuple[int, ...]]
    sizes: dict[str, Size]
    dtype: torch.dtype
    device: torch.device
    where: str

    def open(self, args: Sequence[Any], origin: Origin) -> SlotStore:
        """The store of this site for a call, with room for the call's tokens."""
        new = self.sizes["S"](args)
        if self.past is None:
            return self._fresh(args, origin, new)
        key, value = (args[at] for at in self.past)
        if key.shape[self.layouts[0].token_axis] == 0:
            return self._fresh(args, origin, new)
        store = unwrap((key, value), self.layouts, self.where)
        store.layouts = self.layouts
        if origin.declined:
            store.origin = origin
        store.make_room(store.tokens + new)
        return store

    def _fresh(self, args: Sequence[Any], origin: Origin, tokens: int) -> SlotStore:
        b, hkv, d, dv = (self.sizes[letter](args) for letter in ("B", "Hkv", "D", "Dv"))
        with torch.inference_mode(False):  # a cache begun in inference mode can go on under no_grad
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            state = SlotStore.empty_state(self.rule, tokens, like, b, hkv, d, dv)
        return SlotStore(self.name, self.layer, self.rule, self.layouts, origin, state)


class Bound:
    """What a kvpass backend hands to Dynamo for a rewritten graph.

    Attributes:
        inner: the compiled rewritten graph; takes the original inputs and then five state tensors for each site.
        outputs: number of outputs of the original graph; the inner one returns those that are no cache.
        watched: places of inputs that the graph reads as data; those that are no past of a site must not be shells.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        bindings: Sequence[Binding],
        outputs: int,
        origin: Origin,
        watched: Sequence[int] = (),
    ) -> None:
        self.inner, self.bindings, self.origin = inner, tuple(bindings), origin
        self.watched = tuple(at for at in watched if not any(at in (b.past or ()) for b in bindings))
        cached = {at for b in bindings for half in b.returned for at in half}
        self.kept = [at for at in range(outputs) if at not in cached]
        self.outputs = outputs

    def __call__(self, *args: Any) -> list[Any]:
        refuse(args, self.watched, "")
        stores = [binding.open(args, self.origin) for binding in self.bindings]
        results = self.inner(*args, *(t for store in stores for t in store.state))
        returned: list[Any] = [None] * self.outputs
        for at, value in zip(self.kept, results, strict=True):
            returned[at] = value
        for binding, store in zip(self.bindings, stores, strict=True):
            store.tokens += binding.sizes["S"](args)
            for half, places in enumerate(binding.returned):
                shell = make(store, half)
                for at in places:
                    returned[at] = shell
        return returned


class Untouched:
    """A compiled graph without a rewritten site, which must not be given shells to read."""

    def __init__(self, inner: Callable[..., Any], watched: Sequence[int]) -> None:
        self.inner, self.watched = inner, tuple(watched)

    def __call__(self, *args: Any) -> Any:
        refuse(args, self.watched, "")
        return self.inner(*args)
