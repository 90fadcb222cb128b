"""Scores with weights from a file: small projections of keys, values or positions."""

from __future__ import annotations

import torch
from kvpass.kernels.rank.scorers.registry import scorer
from kvpass.kernels.rank.scorers.seen import Seen
from kvpass.kernels.rank.tables import layer_of
from torch import Tensor


def read(path: str, name: str, seen: Seen) -> Tensor:
    """A tensor of the weight file for the keys' layer."""
    return layer_of(path, name, seen.layer, seen.pos.device)


@scorer("q_filters", reads=("keys", "layer"), pointwise=True, tensors={"filters": "layers Hkv D"})
def q_filters(seen: Seen, file: str = "") -> Tensor:
    """-<f_h, k>: `filters` [layers, Hkv, D] of the file (arXiv 2503.02812)."""
    filters = read(file, "filters", seen)
    return -(seen.keys * filters[:, None]).sum(-1)


@scorer(
    "gate",
    reads=("hidden", "layer"),
    pointwise=True,
    tensors={"w1": "layers hidden size", "b1": "layers hidden", "w2": "layers Hkv hidden", "c": "layers Hkv"},
)
def gate(seen: Seen, file: str = "") -> Tensor:
    """An MLP over the block's hidden states gives each KV head a log-retention: logsigmoid(w2 silu(w1 x + b1) + c), for
    TRIM-KV (arXiv 2512.03324, with `decay: true`): `w1` [layers, hidden, size], `b1` [layers, hidden], `w2`
    [layers, Hkv, hidden], `c` [layers, Hkv].
    """
    w1, b1, w2, c = (read(file, name, seen) for name in ("w1", "b1", "w2", "c"))
    inner = torch.nn.functional.silu(seen.hidden @ w1.mT + b1)
    return torch.nn.functional.logsigmoid(inner @ w2.mT + c).transpose(1, 2)


@scorer(
    "surrogate",
    reads=("hidden", "layer"),
    pointwise=True,
    tensors={"weight": "layers Hkv size", "bias": "layers Hkv"},
)
def surrogate(seen: Seen, file: str = "") -> Tensor:
    """A linear map of the block's hidden states to a score for every KV head (KVzap, arXiv 2601.07891): `weight`
    [layers, Hkv, size], `bias` [layers, Hkv].
    """
    weight, bias = read(file, "weight", seen), read(file, "bias", seen)
    return (seen.hidden @ weight.mT + bias).transpose(1, 2)


@scorer(
    "kvp",
    reads=("keys", "values", "layer", "places"),
    pointwise=True,
    tensors={
        "w1": "layers Hkv hidden D+Dv+1",
        "b1": "layers Hkv hidden",
        "w2": "layers Hkv hidden",
        "b2": "layers Hkv",
    },
)
def kvp(seen: Seen, file: str = "") -> Tensor:
    """An MLP per KV head over [k; v; position], ReLU between (arXiv 2602.10238): `w1` [layers, Hkv, hidden, D+Dv+1],
    `b1` [layers, Hkv, hidden], `w2` [layers, Hkv, hidden], `b2` [layers, Hkv].
    """
    x = torch.cat([seen.keys, seen.values, (seen.pos - seen.first)[..., None].float()], -1)
    w1, b1, w2, b2 = (read(file, name, seen) for name in ("w1", "b1", "w2", "b2"))
    hidden = (x @ w1.mT + b1[:, None]).relu()
    return (hidden * w2[:, None]).sum(-1) + b2[:, None]
