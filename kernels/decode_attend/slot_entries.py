"""Keys and values of a step's heads as attention reads them, whatever slots hold."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.entries import decoded, turned
from kvpass.kernels.codecs.storage import WHOLE_AT, Storage, coded
from kvpass.kernels.codecs.whole import counted, found, listed
from kvpass.kernels.decode_attend.step import HeadRange, StepFacts
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.reductions import Slots
from kvpass.kernels.slots.state import State
from torch import Tensor

Copies = tuple[Tensor, Tensor, Tensor]
"""Heads and slots that have a whole copy, and its place: int64 [copies] each."""


def copies_of(state: State, heads: HeadRange, facts: StepFacts, rule: Rule) -> Copies | None:
    """Of some heads' used slots; None where nothing is held whole beside codes."""
    if not coded(rule) or not rule[Storage].whole:
        return None
    if isinstance(facts.first, int) and not facts.parted:
        return counted(heads.cells(state.pos), facts.first, facts.position, rule)
    return listed(_of(state[WHOLE_AT], heads), heads.cells(state.pos), rule)


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
        row, slot, place = copies
        logits[row, :, slot] = torch.bmm(queries, _of(held, heads).float().mT)[row, :, place]
    return logits


def mixed(weights: Tensor, state: State, heads: HeadRange, copies: Copies | None, rule: Rule) -> Tensor:
    """float32 [heads, G, Dv]: the values in the used slots of some heads, mixed by weights float32 [heads, G, n]."""
    held = state.v
    if "v" not in coded(rule):
        return torch.bmm(weights, heads.rows(held).float())
    storage = rule[Storage]
    parts, own = [heads.rows(state[name]) for name in storage.code_fields("v")], None
    if copies is not None:
        row, slot, place = copies
        own = weights.new_zeros(*weights.shape[:2], storage.whole)
        own[row, :, place] = weights[row, :, slot]
        weights = weights.clone()
        weights[row, :, slot] = 0.0
    out = storage.codec_of("v").mixed(weights, parts, held.shape[3], storage.scale_group)
    out = turned(out, "v", rule)
    if own is None or copies is None:
        return out
    values = _of(held, heads).float()
    if len(copies[0]) < own.shape[0] * own.shape[2]:  # what has gone may be infinite, and 0 times that is no number
        row, _, place = copies
        there = own.new_zeros(len(own), storage.whole, dtype=torch.bool)
        there[row, place] = True
        values = values.masked_fill(~there[..., None], 0.0)
    return torch.baddbmm(out, own, values)


def _of(x: Tensor, heads: HeadRange) -> Tensor:
    """What belongs to some heads, of x [B, Hkv, ..]."""
    return x.flatten(0, 1)[heads.first : heads.last]


def read_all(state: State, half: str, slots: Slots, rule: Rule) -> Tensor:
    """Keys (`k`) or values (`v`) in all slots, nothing read back: float32 [B, Hkv, C, width], rotated if the rule says
    so; undefined where nothing is.
    """
    held, pos = state[half], state.pos
    if half not in coded(rule):
        return held.float()
    x = decoded([state[name] for name in rule[Storage].code_fields(half)], half, held.shape[3], rule)
    if not rule[Storage].whole:
        return x
    place, there = found(slots.owned(state[WHOLE_AT]), pos)
    return torch.where(there[..., None], slots.picked(turned(held.float(), half, rule), place), x)
