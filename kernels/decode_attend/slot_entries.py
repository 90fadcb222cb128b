"""Keys and values of a step's heads as attention reads them, whatever slots hold."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.entries import decoded, places, turned
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.decode_attend.copies import Copies
from kvpass.kernels.decode_attend.step import HeadRange
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from torch import Tensor


def products(
    queries: Tensor, factor: float, state: State, heads: HeadRange, copies: Copies | None, rule: Rule
) -> Tensor:
    """float32 [heads, G, slots]: queries float32 [heads, G, D] times the keys in the used slots of some heads, times a
    factor.
    """
    held = state.k
    if "k" not in coded(rule):
        return torch.baddbmm(queries.new_empty(1), queries, heads.rows(held).float().mT, beta=0, alpha=factor)
    storage, queries = rule[Storage], queries * factor
    parts = [heads.rows(state[name]) for name in storage.code_fields("k")]
    logits = storage.codec_of("k").products(turned(queries, "k", rule), parts, storage.scale_group)
    if copies is not None:
        copies.put(torch.bmm(queries, _of(held, heads).float().mT), logits)
    return logits


def mixed(weights: Tensor, state: State, heads: HeadRange, copies: Copies | None, rule: Rule) -> Tensor:
    """float32 [heads, G, Dv]: the values in the used slots of some heads, mixed by weights float32 [heads, G, n]."""
    held = state.v
    if "v" not in coded(rule):
        return torch.bmm(weights, heads.rows(held).float())
    storage = rule[Storage]
    parts, own = [heads.rows(state[name]) for name in storage.code_fields("v")], None
    if copies is not None:
        weights, own, there = copies.take(weights, held.shape[2])
    out = storage.codec_of("v").mixed(weights, parts, held.shape[3], storage.scale_group)
    out = turned(out, "v", rule)
    if own is None:
        return out
    values = _of(held, heads).float()
    return torch.baddbmm(out, own, values if there is None else values.masked_fill(~there[..., None], 0.0))


def _of(x: Tensor, heads: HeadRange) -> Tensor:
    """What belongs to some heads, of x [B, Hkv, ..]."""
    return x.flatten(0, 1)[heads.first : heads.last]


def read_all(state: State, half: str, slots: Slots, rule: Rule) -> Tensor:
    """Keys (`k`) or values (`v`) in all slots, nothing read back: float32 [B, Hkv, C, width], rotated if the rule says
    so; undefined where nothing is.
    """
    held = state[half]
    if half not in coded(rule):
        return held.float()
    x = decoded([state[name] for name in rule[Storage].code_fields(half)], half, held.shape[3], rule)
    if not rule[Storage].copies:
        return x
    place, there = places(state, slots.owned(state[WHOLE_AT]), rule)
    return torch.where(there[..., None], slots.picked(turned(held.float(), half, rule), place), x)
