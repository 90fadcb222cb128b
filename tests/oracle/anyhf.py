"""The simulator inside any unmodified transformers model, however it spells attention.

The model runs eagerly with its own cache, which keeps every token. A function mode follows the keys that the cache
hands out through all operations: a softmax whose input comes from them is this layer's attention. What the simulator
has evicted is hidden there, and the probabilities are what it observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from oracle.simulator import Simulator
from spelling import given_cache
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

SOFTMAX = (torch.softmax, F.softmax, torch.Tensor.softmax, torch.special.softmax)
LOGSUMEXP = (torch.logsumexp, torch.Tensor.logsumexp)
SIGMOID = (torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid)
HIDDEN = -1e8
"""Logits below were hidden by the model's mask."""
MAX_SINKS = 4


class Unreadable(RuntimeError):
    """The oracle cannot follow this model: its attention is not a softmax over the cached keys."""


@dataclass(frozen=True)
class Keys:
    """Where a tensor comes from: the keys of one cache layer, as the cache returned them in this call."""

    serial: int
    layer: int
    batch: int
    heads: int
    queries: int
    length: int


def origin(values: Any) -> Keys | None:
    """The latest keys that any of these tensors comes from."""
    found = [leaf._keys for leaf in tree_leaves(values) if hasattr(leaf, "_keys")]
    return max(found, key=lambda keys: keys.serial, default=None)


def mark(values: Any, keys: Keys) -> None:
    for leaf in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(leaf, torch.Tensor):
            leaf._keys = keys  # type: ignore[attr-defined]


class Watch(TorchFunctionMode):
    """One call of a model: attention of the layers in `evicting` sees and reports what the simulator wants."""

    def __init__(
        self, simulator: Simulator, evicting: set[int], mask: torch.Tensor | None = None, one_head: bool = False
    ) -> None:
        super().__init__()
        self.simulator, self.evicting, self.mask, self.one_head = simulator, evicting, mask, one_head
        self.serial = 0
        self.entered: set[int] = set()
        self.outside: dict[int, torch.Tensor] = {}  # share of the probability that is not a sink's, where kept apart
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def updated(self, layer: int, new: torch.Tensor, keys: torch.Tensor) -> None:
        """The cache returned the keys of a layer."""
        if keys.dim() != 4:
            raise Unreadable(f"keys of layer {layer} are {keys.dim()}-d")
        if layer in self.entered:
            raise Unreadable(f"layer {layer} is updated twice in one call")
        self.serial += 1
        batch, heads, length, _ = keys.shape
        mark(keys, Keys(self.serial, layer, batch, 1 if self.one_head else heads, new.shape[-2], length))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = origin((args, kwargs))
        if keys is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.sdpa(keys, *args, **kwargs) if keys.layer in self.evicting else func(*args, **kwargs)
        if func in LOGSUMEXP and self.is_attention(keys, args[0]):
            out = self.logsumexp(keys, args[0])
        else:
            out = func(*args, **kwargs)
        if func in SIGMOID and keys.layer in self.outside:
            self.outside[keys.layer] = out.double()
        if func in SOFTMAX:  # what follows are values, not keys
            return self.softmax(keys, args[0], out) if self.is_attention(keys, args[0]) else out
        mark(out, keys)
        return out

    def is_attention(self, keys: Keys, logits: torch.Tensor) -> bool:
        sinks = logits.shape[-1] - keys.length
        return keys.layer in self.evicting and logits.dim() >= 3 and 0 <= sinks <= MAX_SINKS

    def softmax(self, keys: Keys, logits: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """The probabilities without the evicted tokens, in the form of the original's."""
        by_head, visible = self.visible(keys, logits)
        rows = torch.softmax(by_head, -1).nan_to_num_(nan=0.0)
        observed = rows[..., : keys.length]
        if keys.layer in self.outside:
            observed = observed * self.outside[keys.layer][..., None]
        self.seen.setdefault(keys.layer, []).append((observed, visible))
        return heads_back(rows, logits).to(original.dtype)

    def logsumexp(self, keys: Keys, logits: torch.Tensor) -> torch.Tensor:
        """Of the tokens that were not evicted. A model that takes it weighs a sink: sigmoid(logsumexp - sink) is what
        the sink leaves of a row."""
        by_head, _ = self.visible(keys, logits)
        out = torch.logsumexp(by_head, -1).clamp(min=torch.finfo(logits.dtype).min)
        self.outside[keys.layer] = torch.ones_like(out)
        return out.to(logits.dtype)

    def visible(self, keys: Keys, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as float64 [B,Hq,S,T+sinks] without what is hidden or evicted, and what is visible [B,Hq,S,T]."""
        by_head = heads_first(logits, keys)
        sees = (by_head[..., : keys.length] > HIDDEN) & self.queries(keys)
        if keys.layer in self.entered:
            visible = self.simulator.visible(keys.layer, sees)
        else:
            visible = self.simulator.enter(keys.layer, sees, keys.heads)
            self.entered.add(keys.layer)
        hidden = F.pad(~visible, (0, by_head.shape[-1] - keys.length), value=False)
        return by_head.double().masked_fill(hidden, -torch.inf), visible

    def queries(self, keys: Keys) -> torch.Tensor:
        """[B,1,S,1]: which queries are no padding. Their logits do not always say: a row that is hidden as a whole is
        all zeros once a model has subtracted its maximum."""
        if self.mask is None or self.mask.shape[-1] != keys.length:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return self.mask[:, None, -keys.queries :, None].bool()

    def sdpa(
        self,
        keys: Keys,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """F.scaled_dot_product_attention by its definition."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask.double()
        return (self.softmax(keys, logits, logits) @ v.double()).to(q.dtype)

    def finish(self) -> None:
        """End of the call: the simulator learns from it and evicts."""
        for layer in sorted(self.evicting):
            if layer not in self.seen:
                raise Unreadable(f"no softmax over the keys of layer {layer} was seen")
            heads = len(self.simulator.layers[layer].heads[0])
            parts = zip(*self.seen[layer], strict=True)
            rows, visible = (torch.cat([grouped(t, heads) for t in part], 2) for part in parts)
            for b in range(rows.shape[0]):
                for h in range(heads):
                    self.simulator.observe(layer, b, h, rows[b, h], visible[b, h])
            self.simulator.leave(layer)


def grouped(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[B,Hq,S,T] as [B,Hkv,G,S,T]: query head h reads KV head h // G."""
    return rows.unflatten(1, (heads, -1))


def heads_first(logits: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Attention logits as [B,Hq,S,T]."""
    shape, queries = logits.shape, keys.queries
    if logits.dim() == 3 and shape[1] == queries:
        return logits.unflatten(0, (keys.batch, -1))
    if logits.dim() == 4 and shape[2] == queries:
        return logits
    if logits.dim() == 5 and shape[3] == queries:
        return logits.flatten(1, 2)
    raise Unreadable(f"attention logits of shape {tuple(shape)}, with {queries} queries")


def heads_back(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The inverse of `heads_first`: every form it accepts has the same order in memory."""
    return rows.reshape(logits.shape)


SECOND = 1000
"""Layers of the second half of an EncoderDecoderCache count from here: blt keeps its decoder's own tokens there."""


def numbered(cache: Any) -> list[tuple[int, Any]]:
    """The caches in a cache, each with the number of its first layer."""
    if hasattr(cache, "self_attention_cache"):
        return [(0, cache.self_attention_cache), (SECOND, cache.cross_attention_cache)]
    return [(0, cache)]


@contextmanager
def watching(watch: Watch, cache: Any) -> Iterator[None]:
    """Run a call under `watch`, which is told of every update of `cache`; None: of the cache that the model makes."""
    original = Cache.update
    first = {id(part): number for number, part in numbered(cache)}

    def update(self: Cache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *a: Any, **kw: Any):
        keys, values = original(self, key_states, value_states, layer_idx, *a, **kw)
        number = 0 if cache is None else first.get(id(self))
        if number is not None:
            watch.updated(number + layer_idx, key_states, keys)
        return keys, values

    with mock.patch.object(Cache, "update", update), watch:
        yield


class AnyOracle:
    """A conversation with any transformers model; the layers in `evicting` evict, the others keep everything.

    `one_head`: all KV heads of a layer are one, as where a query reads the keys of one head and the values of another.
    """

    def __init__(
        self, model: Any, policy: str, budget: float | int, floor: int, evicting: set[int], one_head: bool = False
    ) -> None:
        self.model, self.evicting, self.one_head = model, evicting, one_head
        self.simulator = Simulator(policy, budget, floor)

    def __call__(self, **inputs: Any) -> Any:
        """One call, with the cache among its inputs unless the model makes its cache. Returns the model's
        output; afterwards `simulator` holds what each layer keeps."""
        watch = Watch(self.simulator, self.evicting, inputs.get("attention_mask"), self.one_head)
        with torch.no_grad(), watching(watch, given_cache(inputs)):
            out = self.model(**inputs)
        watch.finish()
        return out
