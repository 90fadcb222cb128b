"""Who competes: the model with Hugging Face's caches and with kvpass', under the same inner compilers."""

from __future__ import annotations

import contextlib
import copy
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import smollm2
import torch
from spelling import cache_of, with_cache
from transformers import StaticCache

FROZEN = {"freezing": True}
"""Options of Inductor under which weights are constants, laid out for the machine's kernels."""
TUNED = {**FROZEN, "max_autotune": True}
"""The same, and products with weights by Inductor's own C++ where that is faster on this machine than MKL."""
INNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("eager", {}),
    "inductor": ("inductor", {}),
    "frozen": ("inductor", FROZEN),
    "tuned": ("inductor", TUNED),
}
"""What every contender may run under, by the word in its name."""


@dataclass(frozen=True)
class Spec:
    """A contender, as data: `policy` None is the unmodified model with Hugging Face's own cache."""

    name: str
    inner: str
    policy: str | None = None
    budget: float = 1.0
    static: bool = False
    mode: str = "default"
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def under(self) -> str:
        """The word of `INNERS`."""
        return next(word for word, value in INNERS.items() if value == (self.inner, self.options))


def hf(kind: str, under: str) -> Spec:
    """Hugging Face's `dynamic` or `static` cache under an inner compiler of `INNERS`."""
    inner, options = INNERS[under]
    return Spec(f"HF {kind}, {under}", inner, static=kind == "static", options=options)


def ours(policy: str, under: str, budget: float = 0.2) -> Spec:
    """kvpass with a policy; `full` keeps everything."""
    inner, options = INNERS[under]
    share = 1.0 if policy == "full" else budget
    name = f"kvpass {policy}" if policy == "full" else f"kvpass {policy} {share:.0%}".replace("%", " %")
    return Spec(f"{name}, {under}", inner, policy, share, options=options)


def prepare(model: Any, spec: Spec) -> Any:
    """A model to call: the original, a compiled copy that shares its weights, or kvpass' copy."""
    if spec.policy is not None:
        import kvpass

        more = {} if spec.mode == "default" else {"mode": spec.mode}  # older checkouts know no mode
        inner: Any = {"name": spec.inner, **spec.options} if spec.options else spec.inner
        return kvpass.compile(model, policy=spec.policy, budget=spec.budget, inner=inner, **more)
    if spec.inner == "eager":
        return model
    compiled = copy.copy(model)
    if spec.options:
        compiled.compile(backend=spec.inner, options=spec.options)
    else:
        compiled.compile(backend=spec.inner)
    return compiled


def tracing(spec: Spec) -> AbstractContextManager[Any]:
    """Entered around calls that compile: Dynamo hands weights to Inductor as constants if Inductor's own settings say
    so, whatever the options of `compile`."""
    if spec.policy is None and spec.options:
        from torch._inductor import config

        return config.patch(spec.options)  # type: ignore[no-any-return]  # torch does not say what patch returns
    return contextlib.nullcontext()


class Contender:
    """A model, its cache, and the token it will read next."""

    def __init__(self, spec: Spec, model: Any, max_length: int) -> None:
        self.spec, self.max_length = spec, max_length
        self.model = prepare(model, spec)
        self.cache: Any = None
        self.token: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.said: list[list[int]] = []

    def prefill(self, ids: torch.Tensor) -> None:
        """Reads the prompt into a new cache; the old one is dropped first."""
        self.cache = StaticCache(self.model.config, self.max_length) if self.spec.static else None
        self.said.clear()
        self.advance(self.model(input_ids=ids, **with_cache(self.model, self.cache), use_cache=True, logits_to_keep=1))

    def adopt(self, other: Contender) -> None:
        """Goes on where another one of the same policy is, with a copy of its cache."""
        self.token, self.said = other.token, list(other.said)
        if not self.spec.static or other.spec.static:
            self.cache = copy.deepcopy(other.cache)
            return
        self.cache = StaticCache(self.model.config, self.max_length)
        for at, layer in enumerate(other.cache.layers):
            self.cache.update(layer.keys, layer.values, at)

    def grows(self) -> None:
        """Tells Dynamo, which else learns it from a second compilation, that a dynamic cache grows."""
        if self.spec.policy is None and self.spec.inner != "eager" and not self.spec.static:
            for layer in self.cache.layers:
                torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
                torch._dynamo.maybe_mark_dynamic(layer.values, 2)

    def step(self, token: torch.Tensor | None = None) -> None:
        """Reads a token [B, 1]; by default the one that it said itself."""
        given = self.token if token is None else token
        self.advance(self.model(input_ids=given, **with_cache(self.model, self.cache), use_cache=True))

    def advance(self, out: Any) -> None:
        self.cache, self.logits = cache_of(out), out.logits[:, -1]
        self.token = self.logits.argmax(-1, keepdim=True)
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


def prompt(tokenizer: Any, context: int, batch: int) -> torch.Tensor:
    """Real text, [batch, context]: each row goes on where the one before ended."""
    whole = tokenizer(smollm2.text(6 * context * batch), add_special_tokens=False, return_tensors="pt").input_ids
    return whole[0, : context * batch].reshape(batch, context).contiguous()


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all (the tied embedding is read as the output layer)."""
    return sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL from the reference's next tokens to the other's, in nats, mean over rows; logits [B, V]."""
    a, b = (torch.log_softmax(x.float(), -1) for x in (reference, other.to(reference.device)))
    return float((a.exp() * (a - b)).sum(-1).mean())
