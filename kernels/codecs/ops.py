"""The ops of rules whose slots hold codes: the codes of a call's keys, and whole copies of its newest tokens. Pure
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvpass.kernels.codecs import whole
from kvpass.kernels.codecs.entries import encoded
from kvpass.kernels.codecs.fits import NONE
from kvpass.kernels.codecs.fitting import fitted
from kvpass.kernels.codecs.storage import Storage, coded, fit_fields
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.state import State
from torch import Tensor


def encode_slots(k: Tensor, v: Tensor, rule: str) -> list[Tensor]:
    """Code fields of keys [B, Hkv, L, D] and values [B, Hkv, L, Dv], in the order of the state's fields: each
    [B, Hkv, L, size]. Of rules without a fit.
    """
    return [part.clone() for part in encoded(k, v, {}, Rule.parse(rule)).values()]  # outputs of an op share no memory


def fit_slots(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, cursor: Tensor, fits: Sequence[Tensor], rule: str
) -> None:
    """Fit the heads of rows that have seen no token before to the tokens of this call, in place.

    q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; valid bool [B, S], without padding; cursor as before the call;
    fits: the state's, by `fit_fields`.
    """
    plan = Rule.parse(rule)
    storage, held = plan[Storage], dict(zip(fit_fields(plan), fits, strict=True))
    begins = (cursor[:, :1, SEEN] == 0) & valid.any(-1, keepdim=True)
    for half in coded(plan):
        kind, x = storage.fit(half), (k if half == "k" else v).float()
        if kind != NONE:
            kept = storage.held_width(half, x.shape[-1])
            for part, made in fitted(kind, q, x, valid, kept, storage.atoms).items():
                before = held[f"{half}_{part}"]
                before.copy_(torch.where(begins.view(-1, *[1] * (made.dim() - 1)), made, before))


def encode_fitted(k: Tensor, v: Tensor, fits: Sequence[Tensor], past: Sequence[Tensor], rule: str) -> list[Tensor]:
    """Code fields of a call's keys and values, as `encode_slots`, by fits of their heads.

    fits: the state's, by `fit_fields`, after `fit_slots`. past: what `join_slots` made of the code fields, [B, Hkv, L,
    size], of which the last S are undefined; none in a first call. Returns code fields, each [B, Hkv, L or S, size].
    """
    plan = Rule.parse(rule)
    codes = [*encoded(k, v, dict(zip(fit_fields(plan), fits, strict=True)), plan).values()]
    if not past:
        return codes
    both = zip(past, codes, strict=True)
    return [torch.cat([old.narrow(2, 0, old.shape[2] - k.shape[2]), new], 2) for old, new in both]


def keep_whole(k: Tensor, v: Tensor, valid: Tensor, position: int, state: Sequence[Tensor], rule: str) -> None:
    """Copy those of a call's tokens that are held whole beside their codes into the state, in place, after the call's
    `compact_slots`. k [B, Hkv, S, D], v [B, Hkv, S, Dv], at positions `position` .. ; valid bool [B, S], without
    padding.
    """
    plan = Rule.parse(rule)
    held = State.of(state, plan)
    pos = torch.arange(position, position + k.shape[2], dtype=torch.int32, device=k.device)
    seen = held.cursor[:, :1, SEEN] - valid.sum(-1, keepdim=True)
    whole.keep_whole(k, v, pos, valid, seen, held, plan)
