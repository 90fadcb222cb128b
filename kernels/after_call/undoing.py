"""What taking tokens back asks of a rule: where a step writes, and what older tokens lose by newer ones."""

from __future__ import annotations

from kvpass.kernels.after_call.reindex import Reindex
from kvpass.kernels.codecs.storage import Storage
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.cursor import SEEN
from kvpass.kernels.slots.state import State


def moves_entries(rule: Rule) -> bool:
    """Whether a step may change keys or values in other slots than its token's: where it merges, or turns keys."""
    return rule[Merge].steps or (rule[Reindex].reindex and rule.evicts)


def displaced_copies(state: State, rule: Rule) -> bool:
    """Whether tokens may have taken the places of older ones that were held whole beside their codes."""
    storage = rule[Storage]
    return storage.residual > 0 and int(state.cursor[..., SEEN].max()) > storage.whole
