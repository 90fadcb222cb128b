"""What the attention ops may add to a plain softmax: a cap on the logits, one learned logit per query head, and learned
keys that are no tokens (`memory.py`).

Gemma 2 caps, gpt-oss learns sinks. Not to be confused with `Protected.sinks`, the first tokens that are never evicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Beside(NamedTuple):
    """What each query attends to beside the keys of a call, as if it were one more key; the sinks are part of it."""

    logit: Tensor
    """float32 [B, Hq, S]"""
    value: Tensor
    """float32 [B, Hq, S, Dv]"""

    def of(self, batch: slice, rows: slice = slice(None)) -> Beside:
        """That of some sequences and queries."""
        return Beside(self.logit[batch, :, rows], self.value[batch, :, rows])

    def added(self, mixed: Tensor, taken: Tensor) -> Tensor:
        """Values mixed by the probabilities of a step, [B * Hq, Dv] in any leading dims, with the share that these
        leave; `taken`: their sums.
        """
        return mixed + self.value.reshape(mixed.shape) * (1.0 - taken)


class Softmax(NamedTuple):
    """How an attention op makes probabilities of the products q k."""

    scale: float
    sinks: Tensor | None = None
    """float [Hq]: one more logit per query head, in the denominator alone. Never capped, never masked."""
    softcap: float = 0.0
    """Above 0, logits become softcap * tanh(logit / softcap) before the mask is added."""
    beside: Beside | None = None
    """Then `sinks` is None."""

    @property
    def factor(self) -> float:
        """What products are multiplied by before `capped`."""
        return self.scale / self.softcap if self.softcap else self.scale

    def capped(self, products: Tensor) -> Tensor:
        """Logits of products that carry `factor`; in place."""
        return products.tanh_().mul_(self.softcap) if self.softcap else products

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the last dim of float32 [.., n], whose leading dims flatten to [B * Hq]."""
        rows = logits.shape[:-1]
        if self.beside is not None:
            column = self.beside.logit.reshape(*rows, 1)
        elif self.sinks is not None:
            column = self.sinks.float().expand(rows.numel() // len(self.sinks), -1).reshape(*rows, 1)
        else:
            return logits.softmax(-1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]

    def column(self, kv_heads: int) -> Tensor | None:
        """The logit in the denominator of a step that is no slot's: float32 [1 or B, Hkv, G, 1]."""
        if self.beside is not None:
            return self.beside.logit.reshape(len(self.beside.logit), kv_heads, -1, 1)
        return None if self.sinks is None else self.sinks.float().reshape(1, kv_heads, -1, 1)

    def of(self, batch: slice) -> Softmax:
        """That of some sequences."""
        return self if self.beside is None else self._replace(beside=self.beside.of(batch))


def check_softmax(op: str, heads: int, sinks: Tensor | None, softcap: float) -> None:
    """Raises ValueError for sinks that are not float [heads], or a negative softcap."""
    if softcap < 0.0:
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"{op}: sinks must be float [{heads}], got {sinks.dtype} {list(sinks.shape)}")
