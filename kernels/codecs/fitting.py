"""Fits of heads to the tokens of their first call, as tensors; padding does not count, rows do not know each other."""

from __future__ import annotations

from math import inf

import torch
from kvpass.kernels.codecs.fits import Fit, first_part
from torch import Tensor

QUERIES = 32
"""The last so many say which channels matter (ThinK)."""

NARROW = 16
"""A channel's unit is at least the mean of its head's / 16: one that stands still in the prompt and moves later would
else be all that a token's scale is for.
"""


def balance(q: Tensor, x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """MiKV's balancer (arXiv 2402.18096): keys are divided by sqrt(max |k| / max |q|), channel by channel.

    q: float [B, Hq, S, D], of which neighbours share a head; x: float32 keys [B, Hkv, S, D]; valid: bool [B, S].
    float32 [B, Hkv, D]; 1 where one of both is 0.
    """
    hidden = ~valid[:, None, :, None]
    keys = x.abs().masked_fill(hidden, 0.0).amax(2)
    queries = _grouped(q, x).abs().masked_fill(hidden[:, None], 0.0).amax((2, 3))
    return {"unit": _unit((keys.double() / queries.double()).sqrt().float())}  # torch's own in float32 is off by a bit


def extent(x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """From the lowest to the highest of each channel becomes -1 to 1, as KIVI (arXiv 2402.02750) has a scale for each.

    x: float32 [B, Hkv, S, K]; valid: bool [B, S]. float32 [B, Hkv, K].
    """
    low, high = _ends(x, valid)
    unit = (high - low) / 2
    unit = torch.maximum(unit, unit.mean(-1, keepdim=True) / NARROW)
    return {"center": ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0), "unit": _unit(unit)}


def channels(q: Tensor, x: Tensor, valid: Tensor, kept: int) -> dict[str, Tensor]:
    """The `kept` channels of a head with the largest product of its mean squared key and that of its last queries
    (ThinK, arXiv 2407.21018), in their order. int16 [B, Hkv, kept]; of equal ones the first.
    """
    hidden = ~valid[:, None, :, None]
    late = valid & (valid.flip(-1).cumsum(-1).flip(-1) <= QUERIES)
    keys = x.square().masked_fill(hidden, 0.0).mean(2)
    queries = _grouped(q, x).square().masked_fill(~late[:, None, None, :, None], 0.0).mean((2, 3))
    best = (queries * keys).argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return {"order": best.sort(-1).values.to(torch.int16)}


def spread(x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Channels of large range first, then those of small range, which become frequencies (VidKV, arXiv 2503.16257);
    and the extent of what comes out.
    """
    low, high = _ends(x, valid)
    ranked = (high - low).argsort(dim=-1, descending=True, stable=True)
    first = first_part(x.shape[-1])
    order = torch.cat([ranked[..., :first].sort(-1).values, ranked[..., first:].sort(-1).values], -1).to(torch.int16)
    seen = Fit(x.shape[-1], True, order.unsqueeze(-2)).picked(x)
    return {"order": order, **extent(seen, valid)}


def atoms(x: Tensor, valid: Tensor, count: int) -> dict[str, Tensor]:
    """A dictionary of `count` atoms: vectors of tokens, evenly out of all, of length 1, float16 [B, Hkv, count, K].

    CSR (arXiv 2412.11741) samples a part of its dictionary online.
    """
    order, tokens = (~valid).int().argsort(dim=-1, stable=True), valid.sum(-1, keepdim=True)
    place = order.gather(-1, torch.arange(count, device=x.device) * tokens // count)
    found = x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    length = found.square().sum(-1, keepdim=True).sqrt()
    return {"atoms": (found / torch.where(length > 0, length, 1.0)).to(torch.float16)}


def fitted(kind: str, q: Tensor, x: Tensor, valid: Tensor, kept: int, count: int = 0) -> dict[str, Tensor]:
    """The parts of a kind of fit: of `kept` channels, or `count` atoms. What rows without a token have of it means
    nothing.
    """
    if kind == "atoms":
        return atoms(x, valid, count)
    if kind == "balance":
        return balance(q, x, valid)
    if kind == "range":
        return extent(x, valid)
    return channels(q, x, valid, kept) if kind == "channels" else spread(x, valid)


def _grouped(q: Tensor, x: Tensor) -> Tensor:
    """float32 [B, Hkv, G, S, D]"""
    by_head: Tensor = q.float().unflatten(1, (x.shape[1], -1))
    return by_head


def _ends(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    hidden = ~valid[:, None, :, None]
    return x.masked_fill(hidden, inf).amin(2), x.masked_fill(hidden, -inf).amax(2)


def _unit(found: Tensor) -> Tensor:
    """1 where nothing can be divided by what was found."""
    return torch.where((found > 0) & found.isfinite(), found, 1.0)
