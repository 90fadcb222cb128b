"""Value weights: what a key's value adds to the output, as a factor of its score. Pure torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kvpass.kernels.ranks import gathered
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.slots.statistics import brought
from torch import Tensor

WEIGHT = brought("weight")
"""A slot's statistic that multiplies its score: a norm of its value."""

_ALL_HERE = Rule()


@dataclass(frozen=True)
class Weight(Record):
    """A norm of the values as a factor of scores.

    Attributes:
        weight: a kind of `value_weights`, or `none`.
        weight_floor: added to the score before.
        top_num, top_den: the share of the budget that the score alone gives, before weights (CriticalKV).
    """

    weight: str = "none"
    weight_floor: float = 0.0
    top_num: int = 0
    top_den: int = 1

    def work(self, rule: Rule) -> Iterator[str]:
        if self.projected:
            yield "T*(v W_O)"

    @property
    def joins(self) -> bool:
        return self.weight == "vo_l1_share"

    @property
    def projected(self) -> bool:
        """Whether it reads the output projection."""
        return self.weight.startswith("vo_")


def value_weights(kind: str, v: Tensor, wo: Tensor | None, rule: Rule = _ALL_HERE) -> Tensor:
    """float32 [B, Hkv, L] of values v [B, Hkv, L, Dv].

    kind: `l1` or `l2`, norms of v (VATP, arXiv 2406.12335); `vo_l1`, of v W_O, mean over the query heads of a group
    (CriticalKV, arXiv 2502.03805); `vo_l1_share`, that as a share of its sum over the KV heads (DefensiveKV,
    arXiv 2510.13334).
    wo: for the last two kinds, the output projection's weight [out, Hq * Dv], as of torch.nn.Linear. rule: says where
    the other heads are.
    """
    norm: Tensor
    if kind in ("l1", "l2"):
        norm = torch.linalg.vector_norm(v.float(), ord=int(kind[1]), dim=-1)
        return norm
    assert wo is not None
    norm = _projected(v, wo)
    return norm / gathered(norm, rule).sum(1, keepdim=True).clamp(min=1e-30) if kind == "vo_l1_share" else norm


def _projected(v: Tensor, wo: Tensor) -> Tensor:
    """||v W_O||_1, mean over the group; one query head at a time: [B, L, out] is the largest tensor."""
    batch, heads, length, wide = v.shape
    group = wo.shape[1] // (heads * wide)
    total = torch.zeros(batch, heads, length, device=v.device)
    for head in range(heads * group):
        part = wo[:, head * wide : (head + 1) * wide].float()
        total[:, head // group] += (v[:, head // group].float() @ part.mT).abs().sum(-1)
    return total / group
