"""One decoder, and the ways in which a host carries its cache and its position from call to call.

Each host is made anew for a conversation: `step(ids) -> logits`, `cache()` is what `kvpass.inspect` is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, DIM, LAYERS, ROOM = 50, 32, 2, 16, 2, 128
Pair = tuple[Tensor, Tensor]


def masked(q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None = None) -> Tensor:
    if shown is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Decoder(nn.Module):
    """Two layers; queries know their position by a factor, so that a wrong counter shows."""

    attend: Callable[..., Tensor] = staticmethod(masked)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.init()

    def init(self) -> None:
        pass

    def run(
        self, ids: Tensor, position: Any, cached: Callable[[int, Tensor, Tensor], Pair], shown: Tensor | None = None
    ) -> Tensor:
        """cached: from a layer and its new keys and values to all of them. shown: the mask, if it is not as usual."""
        more = () if shown is None else (shown,)
        x = self.emb(ids)
        b, t = ids.shape
        for layer, project in enumerate(self.qkv):
            q, k, v = project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            k, v = cached(layer, k, v)
            x = x + self.attend(q * (1 + 1e-3 * position), k, v, *more).transpose(1, 2).reshape(b, t, WIDTH)
        return self.out(x)


def joined(old: Pair | None, k: Tensor, v: Tensor) -> Pair:
    return (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))


class PassedDict(Decoder):
    """A dict of layer -> pair goes in and a new one comes out."""

    def forward(self, ids: Tensor, past: dict[int, Pair]) -> tuple[Tensor, dict[int, Pair]]:
        new: dict[int, Pair] = {}

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            new[layer] = joined(past.get(layer), k, v)
            return new[layer]

        return self.run(ids, past[0][0].shape[2] if past else 0, cached), new


class Filled(Decoder):
    """A dict of layer -> pair is filled in place."""

    def forward(self, ids: Tensor, past: dict[int, Pair]) -> Tensor:
        position = past[0][0].shape[2] if past else 0

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            past[layer] = joined(past.get(layer), k, v)
            return past[layer]

        return self.run(ids, position, cached)


class Counted(Decoder):
    """An int goes in beside a list of pairs; both come out."""

    def forward(self, ids: Tensor, position: int, past: list[Pair]) -> tuple[Tensor, int, list[Pair]]:
        new: list[Pair] = []

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            new.append(joined(past[layer] if past else None, k, v))
            return new[-1]

        return self.run(ids, position, cached), position + ids.shape[1], new


class ModuleCounter(Decoder):
    """An int on the module."""

    def init(self) -> None:
        self.position = 0

    def forward(self, ids: Tensor, past: list[Pair]) -> tuple[Tensor, list[Pair]]:
        position, new = self.position, list[Pair]()
        self.position += ids.shape[1]

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            new.append(joined(past[layer] if past else None, k, v))
            return new[-1]

        return self.run(ids, position, cached), new


class State:
    """The host's own object."""

    def __init__(self) -> None:
        self.seen = 0
        self.pairs: dict[int, Pair] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        self.pairs[layer] = joined(self.pairs.get(layer), k, v)
        return self.pairs[layer]


class ObjectCounter(Decoder):
    """A counter and pairs in an object, changed by the call."""

    def forward(self, ids: Tensor, state: State) -> Tensor:
        position = state.seen
        state.seen += ids.shape[1]
        return self.run(ids, position, state.update)


class ObjectOfModule(Decoder):
    """The same object as an attribute of the module."""

    def init(self) -> None:
        self.state = State()

    def forward(self, ids: Tensor) -> Tensor:
        position = self.state.seen
        self.state.seen += ids.shape[1]
        return self.run(ids, position, self.state.update)


class ListCounter(Decoder):
    """A counter in a list."""

    def forward(self, ids: Tensor, state: list[Any]) -> Tensor:
        position, past, new = state[0], state[1], dict[int, Pair]()
        state[0], state[1] = position + ids.shape[1], new

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            new[layer] = joined(past.get(layer), k, v)
            return new[layer]

        return self.run(ids, position, cached)


class Rebound(Decoder):
    """Registered buffers that are rebound; the position is their length."""

    def init(self) -> None:
        for layer in range(LAYERS):
            for name in ("k", "v"):
                self.register_buffer(f"{name}{layer}", None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            old = getattr(self, f"k{layer}")
            k, v = joined(None if old is None else (old, getattr(self, f"v{layer}")), k, v)
            setattr(self, f"k{layer}", k)
            setattr(self, f"v{layer}", v)
            return k, v

        first: Any = self.k0
        return self.run(ids, 0 if first is None else first.shape[2], cached)


class Attributes(Rebound):
    """Plain attributes that are rebound."""

    def init(self) -> None:
        for layer in range(LAYERS):
            for name in ("k", "v"):
                setattr(self, f"{name}{layer}", None)


class Written(Decoder):
    """Preallocated buffers of the module, and a counter on it that says where to write."""

    def init(self) -> None:
        self.position = 0
        for layer in range(LAYERS):
            for name in ("k", "v"):
                self.register_buffer(f"{name}{layer}", torch.zeros(1, HEADS, ROOM, DIM), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        start, end = self.position, self.position + ids.shape[1]
        self.position = end

        def cached(layer: int, k: Tensor, v: Tensor) -> Pair:
            keys, values = getattr(self, f"k{layer}"), getattr(self, f"v{layer}")
            keys[:, :, start:end], values[:, :, start:end] = k, v
            return keys[:, :, :end], values[:, :, :end]

        return self.run(ids, start, cached)


class Host:
    """One conversation with a model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        kind = type(model).__mro__
        self.past: Any = {} if PassedDict in kind or Filled in kind else []
        self.position = 0
        if ObjectCounter in kind:
            self.past = State()
        elif ListCounter in kind:
            self.past = [0, {}]
        elif ObjectOfModule in kind:
            model.state = State()
        for name in ("k0", "v0", "k1", "v1") if isinstance(model, Rebound) else ():
            setattr(model, name, None)
        if isinstance(model, (ModuleCounter, Written)):
            model.position = 0

    def step(self, ids: Tensor) -> Tensor:
        model = self.model
        result: Any
        if isinstance(model, Counted):
            result, self.position, self.past = model(ids, self.position, self.past)
        elif isinstance(model, (PassedDict, ModuleCounter)):
            result, self.past = model(ids, self.past)
        elif isinstance(model, (Filled, ObjectCounter, ListCounter)):
            result = model(ids, self.past)
        else:
            result = model(ids)
        return result

    @property
    def cache(self) -> Any:
        held = self.past.pairs if isinstance(self.past, State) else self.past
        return held if held else self.model


HOSTS = [PassedDict, Filled, Counted, ModuleCounter, ObjectCounter, ObjectOfModule, ListCounter, Rebound, Attributes,
         Written]  # fmt: skip
