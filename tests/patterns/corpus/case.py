"""How a case of the corpus is written: one small attention, what it is called with, and what becomes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models.attention import hidden, layer, past
from torch import Tensor, nn

UNTOUCHED = "untouched"
MATCHED = "matched"


@dataclass(frozen=True)
class Case:
    """`outcome` is one or more reason codes, UNTOUCHED or MATCHED; `parts` are set on the layer."""

    forward: Callable[..., Any]
    outcome: str
    args: Callable[[], tuple[Any, ...]]
    parts: Callable[[], dict[str, Any]]

    def make(self) -> nn.Module:
        torch.manual_seed(5)
        return layer(self.forward, **self.parts())

    def inputs(self) -> tuple[Any, ...]:
        """The same numbers at every call, in fresh tensors: some cases write into their cache."""
        torch.manual_seed(6)
        return self.args()


@dataclass(frozen=True)
class Conversation:
    """A decoder layer and a host that calls it several times and yields what it gets.

    Attributes:
        quiet: it may not raise.
        nan: a known limit (docs/sharp-edges.md): NaN and no error. Never a number that could be taken for an answer.
    """

    forward: Callable[..., Any]
    host: Callable[..., Any]
    parts: Callable[[], dict[str, Any]]
    quiet: bool
    nan: bool

    def make(self) -> nn.Module:
        torch.manual_seed(5)
        return layer(self.forward, **self.parts())

    def run(self, call: Any) -> list[Any]:
        """All that the host gets; copies, as later calls may write into what earlier ones returned."""
        torch.manual_seed(6)
        return [copy.deepcopy(value) for value in self.host(call)]


CASES: dict[str, Case] = {}
CONVERSATIONS: dict[str, Conversation] = {}


def step() -> tuple[Any, ...]:
    """One new token and a past of five."""
    return hidden(), past()


def prompt() -> tuple[Any, ...]:
    return (hidden(6),)


def case(outcome: str, args: Any = step, parts: Any = dict) -> Callable[[Any], Any]:
    """Put a function into the corpus."""

    def register(forward: Any) -> Any:
        assert forward.__doc__, "say why it must not be rewritten"
        assert forward.__name__ not in CASES
        CASES[forward.__name__] = Case(forward, outcome, args, parts)
        return forward

    return register


def conversation(forward: Any, parts: Any = dict, quiet: bool = False, nan: bool = False) -> Callable[[Any], Any]:
    """Put a host into the corpus, with the decoder layer that it calls."""

    def register(host: Any) -> Any:
        assert host.__doc__, "say what the host does to the cache"
        assert host.__name__ not in CONVERSATIONS
        CONVERSATIONS[host.__name__] = Conversation(forward, host, parts, quiet, nan)
        return host

    return register


def grow(cache: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One KV head for each query head."""
    return tuple(t.repeat_interleave(2, 1) for t in tensors)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = wide(k, v)
    return logits(q, k).softmax(-1) @ v
