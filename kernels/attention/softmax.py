"""What the attention ops may add to a plain softmax: a cap on the logits, and one learned logit per query head.

Gemma 2 caps, gpt-oss learns sinks. Not to be confused with `Protected.sinks`, the first tokens that are never evicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Softmax(NamedTuple):
    """How an attention op makes probabilities of the products q k."""

    scale: float
    sinks: Tensor | None = None
    """float [Hq]: one more logit per query head, in the denominator alone. Never capped, never masked."""
    softcap: float = 0.0
    """Above 0, logits become softcap * tanh(logit / softcap) before the mask is added."""

    @property
    def factor(self) -> float:
        """What products are multiplied by before `capped`."""
        return self.scale / self.softcap if self.softcap else self.scale

    def capped(self, products: Tensor) -> Tensor:
        """Logits of products that carry `factor`; in place."""
        return products.tanh_().mul_(self.softcap) if self.softcap else products

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the last dim of float32 [.., n], whose leading dims flatten to [B * Hq]."""
        if self.sinks is None:
            return logits.softmax(-1)
        rows = logits.shape[:-1]
        column = self.sinks.float().expand(rows.numel() // len(self.sinks), -1).reshape(*rows, 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def check_softmax(op: str, heads: int, sinks: Tensor | None, softcap: float) -> None:
    """Raises ValueError for sinks that are not float [heads], or a negative softcap."""
    if softcap < 0.0:
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"{op}: sinks must be float [{heads}], got {sinks.dtype} {list(sinks.shape)}")
