"""The grammar: a decoder's spelling as choices, and which choices go together.

`draw(choose)` makes one spelling out of anything that chooses: hypothesis (test_spellings.py) or a seed (run.py). The
first option of each choice is the plainest, so that what hypothesis shrinks to is plain.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """Each choice is one way in which people write that part of a decoder.

    Attributes:
        origin: what the cache is before the first call: `nothing` (the first call's keys and values become it),
            `empty` tensors, a buffer `given` by the host, one `made` in the first call
            (`made_like`: the values' by zeros_like).
        home: where it lives between calls.
        heads: how query heads share a KV head.
        parts: how keys and values lie beside each other.
        layout: axes of what is cached.
        attention: the core.
        beside: what else is there.
        positions: how they enter.
        carried: who knows where a call's tokens begin.
        write, read: the new tokens into the cache, and what the attention gets of it.
        room: the buffer's length: the `same` always, its `own` for each conversation, `tight` around a prompt.
        mask, applied: how it is made, and how it enters the logits.
        returned: what a call gives back.
        index: positions are computed once, or anew wherever they are needed.
    """

    layers: int = 1
    origin: str = "nothing"
    home: str = "tuple"
    heads: str = "none"
    parts: str = "apart"
    layout: str = "bhtd"
    attention: str = "sdpa"
    beside: str = "none"
    positions: str = "rotary"
    carried: str = "length"
    write: str = "cat"
    read: str = "all"
    room: str = "same"
    mask: str = "tril"
    applied: str = "bool"
    returned: str = "pair"
    index: str = "once"

    def __repr__(self) -> str:
        """Only what is not the plainest."""
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Spelling({', '.join(said)})"

    @property
    def grows(self) -> bool:
        return self.origin in ("nothing", "empty")

    @property
    def in_place(self) -> bool:
        return self.write in IN_PLACE

    @property
    def in_module(self) -> bool:
        return self.home in ("attribute", "buffer")

    @property
    def in_stack(self) -> bool:
        """One tensor of the host's holds all layers."""
        return self.home in ("stack_lk", "stack_kl", "views")

    @property
    def ends_with_new(self) -> bool:
        """The attention reads up to this call's last token, and not a buffer's unwritten rest."""
        return self.grows or self.read in ("front", "narrow", "front_tensor")

    @property
    def counts(self) -> bool:
        """Where a call begins is a Python int."""
        return self.carried in ("int", "module_int", "object_int")


IN_PLACE = ("slice", "narrow", "index_copy", "index", "scatter", "index_put", "rows")
SLICING = ("slice", "narrow", "slice_scatter", "rows")
PASSED = ("tuple", "dict", "list", "object")


def parse(text: str) -> Spelling:
    """What `repr` wrote."""
    call = ast.parse(text.strip(), mode="eval").body
    assert isinstance(call, ast.Call), f"{text!r} is no Spelling(...)"
    return Spelling(**{word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg})


def leaning(chance: random.Random) -> Callable[[Sequence[Any]], Any]:
    """Chooses the plainest half of the time: people's decoders differ from it in a few choices, not in all at once."""
    return lambda options: options[0] if chance.random() < 0.5 else chance.choice(options)


def draw(choose: Callable[[Sequence[Any]], Any], **fixed: Any) -> Spelling:
    """A spelling, one choice after the other; `fixed` ones where they are possible."""
    spelling = Spelling()
    for field, options in CHOICES.items():
        allowed = options(spelling)
        wanted = [fixed[field]] if fixed.get(field) in allowed else allowed
        spelling = replace(spelling, **{field: choose(wanted)})
    return spelling


BASES = (
    {},
    {"home": "attribute", "layout": "bthd", "heads": "repeat", "attention": "matmul"},
    {"origin": "given", "write": "index_copy", "carried": "index", "heads": "gqa"},
    {"origin": "given", "home": "buffer", "write": "slice", "carried": "int", "read": "front", "layout": "bthd"},
    {"origin": "made", "write": "index", "carried": "tensor", "mask": "positions"},
    {"home": "object", "carried": "object_int"},
)
"""Plain decoders of different kinds."""


def nearby() -> list[Spelling]:
    """The bases, and each with one choice of its own; what must follow from it is as plain as can be."""
    found: dict[Spelling, None] = {}
    for base in BASES:
        plain = draw(lambda options: options[0], **base)
        found[plain] = None
        for field in CHOICES:
            for option in EVERY[field]:
                one = draw(lambda options: options[0], **{**base, field: option})
                if getattr(one, field) == option:
                    found[one] = None
    return list(found)


def objection(spelling: Spelling) -> str:
    """Why there is no such decoder; "" if there is."""
    for field, options in CHOICES.items():
        if getattr(spelling, field) not in options(spelling):
            return f"{field}={getattr(spelling, field)!r} does not go with what was chosen before: {options(spelling)}"
    return ""


def _homes(s: Spelling) -> tuple[str, ...]:
    module = ("attribute", "buffer")
    return PASSED + module + (("stack_lk", "stack_kl", "views") if s.origin == "given" else ())


def _parts(s: Spelling) -> tuple[str, ...]:
    if s.in_stack:
        return ("apart",)
    if s.origin == "made_like":
        return ("apart",)
    if s.heads == "mqa":
        return ("apart", "stacked", "entries")
    return (
        "apart",
        "stacked",
        "stacked_inner",
        "heads",
        "entries",
        "packed",
        *(("unbound",) if s.grows else ()),
    )


def _layouts(s: Spelling) -> tuple[str, ...]:
    if s.heads == "mqa":
        return ("btd",)
    return ("flat",) if s.parts == "packed" else ("bhtd", "bthd", "flat")


def _attentions(s: Spelling) -> tuple[str, ...]:
    return {"gqa": ("sdpa",), "five": ("matmul", "einsum")}.get(s.heads, ("sdpa", "matmul", "einsum"))


def _beside(s: Spelling) -> tuple[str, ...]:
    """`none` more than once: the others are rare."""
    unrotated = () if s.parts == "packed" else ("unrotated",)
    softcap = () if s.attention == "sdpa" else ("softcap",)
    return ("none",) * 5 + ("window", "memory") + softcap + unrotated


def _positions(s: Spelling) -> tuple[str, ...]:
    if s.beside == "unrotated":
        return ("rotary",)
    return ("learned", "alibi") if s.parts == "packed" else ("rotary", "learned", "alibi")


def _carried(s: Spelling) -> tuple[str, ...]:
    length = ("length",) if s.grows else ()
    return (
        *length,
        "int",
        "tensor",
        "index",
        "counter",
        "range",
        "module_int",
        *(("object_int",) if s.home == "object" else ()),
    )


def _writes(s: Spelling) -> tuple[str, ...]:
    if s.grows:
        return ("cat", "cat", "cat", "pad") if s.parts != "unbound" else ("cat",)
    found = [w for w in (*IN_PLACE, "slice_scatter", "where", "blend") if s.counts or w not in SLICING]
    if s.in_stack:
        found = [w for w in found if w in IN_PLACE]
    if s.parts in ("stacked", "stacked_inner"):
        found.remove("index_put")
    return tuple(found)


def _reads(s: Spelling) -> tuple[str, ...]:
    if s.grows:
        return ("all", "all", "cover")
    batch = s.in_place and s.parts not in ("stacked", "stacked_inner")
    ends = ("front", "narrow") if s.counts else ("front_tensor",)
    return ("all", *ends, "cover", *(("batch",) if batch else ()))


def _rooms(s: Spelling) -> tuple[str, ...]:
    return ("same",) if s.grows else ("same", "same", "own", "tight")


def _masks(s: Spelling) -> tuple[str, ...]:
    if not s.ends_with_new:
        return ("positions", "host", *(("rows",) if s.room == "same" else ()))
    plain = s.positions != "alibi" and s.beside not in ("window", "memory")
    causal = ("causal", "causal_both") if plain and s.attention == "sdpa" else ()
    return ("tril", "positions", "host", *causal, *(("prompt",) if plain else ()))


def _applied(s: Spelling) -> tuple[str, ...]:
    if s.mask in ("causal", "causal_both"):
        return ("bool",)
    if s.attention == "sdpa":
        return ("inf", "min") if s.positions == "alibi" else ("bool", "inf", "min")
    return ("inf", "min", "fill", "where")


def _returned(s: Spelling) -> tuple[str, ...]:
    if s.in_module or s.in_stack:
        return ("logits",)
    kept = s.home != "tuple" or (s.origin == "given" and s.in_place)
    order = ("values_first",) if s.home == "tuple" and s.parts == "apart" else ()
    covered = ("covered",) if s.grows and s.home == "tuple" else ()
    return ("pair", *order, "nested", *covered, *(("logits",) if kept else ()))


CHOICES: dict[str, Callable[[Spelling], tuple[Any, ...]]] = {
    "layers": lambda s: (1, 2),
    "origin": lambda s: ("nothing", "empty", "given", "made", "made_like"),
    "home": _homes,
    "heads": lambda s: ("none", "repeat", "expand", "gqa", "five", "mqa"),
    "parts": _parts,
    "layout": _layouts,
    "attention": _attentions,
    "beside": _beside,
    "positions": _positions,
    "carried": _carried,
    "write": _writes,
    "read": _reads,
    "room": _rooms,
    "mask": _masks,
    "applied": _applied,
    "returned": _returned,
    "index": lambda s: ("once", "twice"),
}
"""Each choice's options, after the choices before it: [field] -> options, the plainest first."""

EVERY: dict[str, list[Any]] = {field: [] for field in CHOICES}
"""All options of each choice, whatever was chosen before."""
for _seed in range(400):
    _one = draw(random.Random(_seed).choice)
    for _field in CHOICES:
        if getattr(_one, _field) not in EVERY[_field]:
            EVERY[_field].append(getattr(_one, _field))
