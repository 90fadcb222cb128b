"""Who competes: the model with Hugging Face's caches and with kvpass', under the same inner compilers."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spelling import cache_of, with_cache
from transformers import StaticCache


@dataclass(frozen=True)
class Spec:
    """A contender, as data: `policy` None is the unmodified model with Hugging Face's own cache."""

    name: str
    inner: str
    policy: str | None = None
    budget: float = 1.0
    static: bool = False
    mode: str = "default"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SPECS = (
    Spec("HF dynamic, eager", "eager"),
    Spec("HF dynamic, inductor", "inductor"),
    Spec("HF static, inductor", "inductor", static=True),
    Spec("kvpass full, eager", "eager", "full"),
    Spec("kvpass h2o 20 %, eager", "eager", "h2o", 0.2),
    Spec("kvpass snapkv 20 %, eager", "eager", "snapkv", 0.2),
    Spec("kvpass knorm 20 %, eager", "eager", "knorm", 0.2),
    Spec("kvpass ada_snapkv 20 %, eager", "eager", "ada_snapkv", 0.2),
    Spec("kvpass full, inductor", "inductor", "full"),
    Spec("kvpass h2o 20 %, inductor", "inductor", "h2o", 0.2),
    Spec("kvpass snapkv 20 %, inductor", "inductor", "snapkv", 0.2),
)


def prepare(model: Any, spec: Spec) -> Any:
    """A model to call: the original, a compiled copy that shares its weights, or kvpass' copy."""
    if spec.policy is not None:
        import kvpass

        more = {} if spec.mode == "default" else {"mode": spec.mode}  # older checkouts know no mode
        return kvpass.compile(model, policy=spec.policy, budget=spec.budget, inner=spec.inner, **more)
    if spec.inner == "eager":
        return model
    compiled = copy.copy(model)
    compiled.compile(backend=spec.inner)
    return compiled


class Contender:
    """A model, its cache, and the token it will read next."""

    def __init__(self, spec: Spec, model: Any, max_length: int) -> None:
        self.spec, self.max_length = spec, max_length
        self.model = prepare(model, spec)
        self.cache: Any = None
        self.token: torch.Tensor | None = None
        self.said: list[list[int]] = []

    def prefill(self, ids: torch.Tensor) -> None:
        """Reads the prompt into a new cache; the old one is dropped first."""
        self.cache = StaticCache(self.model.config, self.max_length) if self.spec.static else None
        self.said.clear()
        self.advance(self.model(input_ids=ids, **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1))

    def step(self) -> None:
        self.advance(self.model(input_ids=self.token, **with_cache(self.model, self.cache), use_cache=True))

    def advance(self, out: Any) -> None:
        self.cache = cache_of(out)
        self.token = out.logits[:, -1:].argmax(-1)
        self.said.append(self.token[:, 0].tolist())

    def kv_bytes(self) -> int:
        """Bytes of keys and values that the cache holds now; for the static one that is its whole length."""
        if self.spec.policy is None:
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        import kvpass

        return int(kvpass.report(self.cache).to_dict()["bytes"])

    def timings(self) -> dict[str, float]:
        """Seconds that kvpass spent per stage, summed over its graphs; empty for the others."""
        return dict(getattr(getattr(self.model, "kvpass", None), "timings", None) or {})


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all (the tied embedding is read as the output layer)."""
    return sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())
