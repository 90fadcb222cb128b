"""A store as plain data for a file, facts as JSON and tensors by name; and a store made of them again, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from kvpass.kernels.rule import OPS_VERSION, Rule
from kvpass.kernels.slots.cursor import FREE, LIVE, SEEN
from kvpass.kernels.slots.ragged import is_ragged, places
from kvpass.kernels.slots.state import State, fields_of, sizes_of
from kvpass.runtime.identity import Origin
from kvpass.runtime.store import SlotStore
from kvpass.terms import Layout, Piece

PLAIN = ("name", "layer", "tokens", "length", "used", "waiting", "spare", "calls", "outside", "unplayed")
"""Fields of a store that JSON can say."""
IN_OTHER_WORDS = ("rule", "layouts", "host", "origin", "state", "step", "zero")
"""Those that are said in another form."""
OF_THE_PROCESS = (
    "bases",
    "versions",
    "shown",
    "held",
    "sizes",
    "spoiled",
    "picked",
    "lent",
    "steps",
    "recorded",
    "journal",
    "cuts",
    "course",
)
"""Those that belong to the host's tensors, or to the machine; a spoiled store is not saved. A test asks that each field
is in one of the three.
"""

_TURNED = "turned."
"""Before the names of what positions were turned by, which may not be those of a state's fields."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Unfit(ValueError):
    """What was read is no store, in words; who knows the file makes an error of it."""


def facts_of(store: SlotStore) -> dict[str, Any]:
    """What JSON says of a store."""
    return {name: getattr(store, name) for name in PLAIN} | {
        "rule": store.rule.encode(),
        "layouts": [asdict(one) for one in store.layouts],
        "host": store.host,
    }


def tensors_of(store: SlotStore) -> dict[str, torch.Tensor]:
    """Its tensors by name: all of its state, free slots too."""
    found = {field.name: store.state[field.name] for field in store.state.fields}
    if store.step is not None:
        found[f"{_TURNED}step"] = store.step
    if store.zero is not None:
        found[f"{_TURNED}zero"] = torch.view_as_real(store.zero)
    return found


def restored(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: Origin) -> SlotStore:
    """The store that they were taken of, on the tensors' device, in the tensors' memory.

    Raises:
        Unfit: facts or tensors are missing, of another version, or do not fit together.
    """
    try:
        rule, plain = Rule.parse(facts["rule"]), {name: facts[name] for name in PLAIN}
        first, second = (_layout(one) for one in facts["layouts"])
        host = _tupled(facts["host"])
        version = facts["rule"].split()[0]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Unfit(f"what it says of a layer cannot be read ({type(error).__name__}: {error})") from error
    if version != f"ops={OPS_VERSION}":
        raise Unfit(f"its slots are laid out for {version}, this kvpass has ops={OPS_VERSION}")
    state = _state(rule, tensors, plain["name"])
    _check_slots(state, plain["tokens"], plain["name"])
    store = SlotStore(**plain, rule=rule, layouts=(first, second), origin=origin, state=state, host=host)
    zero = tensors.get(f"{_TURNED}zero")
    store.step = tensors.get(f"{_TURNED}step")
    store.zero = None if zero is None else torch.view_as_complex(zero)
    return store


def _state(rule: Rule, tensors: Mapping[str, torch.Tensor], where: str) -> State:
    """The rule's fields, each of the shape and the dtype that it must have beside the others."""
    fields = fields_of(rule)
    missing = [field.name for field in fields if field.name not in tensors]
    if missing:
        raise Unfit(f"{where} lacks {', '.join(missing)}")
    found = {field.name: tensors[field.name] for field in fields}
    wrong = [f.name for f in fields if found[f.name].dim() != len(f.dims)]
    if not wrong:
        known = {"B": found["cursor"].shape[0], "H": found["cursor"].shape[1], "C": found["pos"].shape[2]}
        known |= {"D": found["k"].shape[3], "V": found["v"].shape[3]}
        known["W"] = State([found[f.name] for f in fields], fields).places
        sizes, kind = sizes_of(rule, known), found["k"].dtype
        shapes = {f.name: tuple(sizes[letter] for letter in f.dims) for f in fields}
        kinds = {f.name: f.dtype or kind for f in fields}
        wrong = [n for n, t in found.items() if tuple(t.shape) != shapes[n] or t.dtype != kinds[n]]
        wrong += ["k"] if kind not in _FLOATS else []
    if wrong:
        t = found[wrong[0]]
        raise Unfit(f"{where} has {wrong[0]} of {t.dtype} {list(t.shape)}, which does not fit to the rest of it")
    return State([found[field.name] for field in fields], fields)


def _check_slots(state: State, tokens: int, where: str) -> None:
    """Kernels trust a cursor: slots in use, and the free one, must exist."""
    cursor, slots = state.cursor, state.slots
    live, free, seen = (cursor[..., column] for column in (LIVE, FREE, SEEN))
    room = torch.full_like(live, slots)
    if is_ragged(cursor):
        room = places(cursor, slots, slots * live.numel())[1].sum(-1).to(live.dtype)
    within = (live >= 0) & (live <= room) & (free >= 0) & (free <= live) & (live <= seen) & (seen <= tokens)
    held = (state.pos >= -1) & (state.pos < max(tokens, 1))
    if not bool(within.all()) or not bool(held.all()):
        raise Unfit(f"{where} counts slots or tokens that it does not have")


def _layout(said: Mapping[str, Any]) -> Layout:
    piece = said["piece"]
    return Layout(_tupled(said["axes"]), None if piece is None else Piece(**{k: _tupled(v) for k, v in piece.items()}))


def _tupled(value: Any) -> Any:
    """Lists, as JSON has them, as the tuples that they were."""
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value
