"""One attention layer in parts, from which tests put together caches of every kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpass

HEADS, KV_HEADS, DIM = 4, 2, 8
WIDTH = HEADS * DIM


class Layer(nn.Module):
    """Projections q, k, v, o; `[B, S, WIDTH]` to `[B, H, S, DIM]`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * DIM), nn.Linear(WIDTH, KV_HEADS * DIM)

    def project(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        memory = x if memory is None else memory
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (t.view(t.shape[0], t.shape[1], -1, DIM).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def finish(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **{"enable_gqa": True, **options})


def hidden(length: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def past(length: int = 5, batch: int = 2, tokens_first: bool = False) -> tuple[Tensor, Tensor]:
    shape = (batch, length, KV_HEADS, DIM) if tokens_first else (batch, KV_HEADS, length, DIM)
    return torch.randn(shape), torch.randn(shape)


def layer(forward: Any, **parts: Any) -> nn.Module:
    """A layer in eval mode whose `forward(self, ...)` is given as a function."""
    torch.manual_seed(3)
    made = type(forward.__name__, (Layer,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made.eval()


def lenient(call: Any, policy: str = "h2o", budget: Any = 8) -> Any:
    """Compiled by kvpass with strict=False."""
    return torch.compile(call, backend=kvpass.backend(policy, budget, inner="eager", strict=False))
