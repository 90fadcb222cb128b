"""Rule: what an op observes and how it picks victims, as a few small records.

The tensor-level form of a planned policy (docs/design/0008-rules-state-and-steps.md). It knows no policy names, no
graphs, no models and no feature: each record stands beside the code that reads it, and says its words, checks, effects.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, TypeVar

OPS_VERSION = 3
"""Raise it when an op's outputs change shape, strides or dtype. It is part of every rule in a graph, and so of the key
of compiled graphs that Inductor keeps on disk: an older one must not be taken for this one.
"""

_SAID_BY: dict[str, type[Record]] = {}
"""The record that says a word."""


@dataclass(frozen=True)
class Record:
    """One part of a rule: a frozen dataclass whose fields are words of a rule's text. Defaults mean that nothing is
    asked. A word belongs to one record only.
    """

    def __init_subclass__(cls) -> None:
        for word in cls.__annotations__:
            other = _SAID_BY.get(word, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"the word {word!r} of {cls.__qualname__} is {other.__qualname__}'s")
        _SAID_BY.update(dict.fromkeys(cls.__annotations__, cls))

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError for what no reader of it would understand."""

    def work(self, rule: Rule) -> Iterator[str]:
        """What it costs a prefill of T tokens beside attention's own work, for people: `T*T`, `32*T`."""
        return iter(())

    @property
    def slot_bytes(self) -> int:
        """What it costs each slot of each KV head beside key, value and position."""
        return 0

    @property
    def evicts(self) -> bool:
        """Whether slots go because of it."""
        return False

    @property
    def demotes(self) -> bool:
        """Whether what goes stays in its slot, in fewer bits."""
        return False

    @property
    def joins(self) -> bool:
        """Whether what a head keeps because of it depends on other heads of the layer, or on the head's number: with
        heads on several ranks they must tell each other (`kvpass.kernels.ranks`).
        """
        return False

    def growing(self) -> Record:
        """What is left of it in calls that evict nothing."""
        return self

    def acts(self, position: int | None) -> bool:
        """Whether a call whose first token is at `position` evicts, as far as this record decides; None: a step."""
        return True

    def resized(self, size: Any, rule: Rule) -> Any:
        """The budget of a head, int or int64 tensor, of what the records before it made of it."""
        return size

    @property
    def arrives(self) -> bool:
        """Whether a generated token's slot starts with more than zeros, given by the op `arrivals`."""
        return False

    @property
    def state_fields(self) -> tuple[Any, ...]:
        """Tensors of a site's state beside those that every rule has (`kvpass.kernels.slots.state.Field`)."""
        return ()

    @property
    def replaced_fields(self) -> dict[str, Any]:
        """What those that every rule has are instead, by name."""
        return {}

    def sizes(self, known: dict[str, Any]) -> dict[str, Any]:
        """Sizes of the dims of its fields that no other record has, by letter; known: those of all states."""
        return {}

    def words(self) -> Iterator[str]:
        """Its part of the text: the fields that differ from their defaults."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                text = "+".join(value) if isinstance(value, tuple) else int(value) if isinstance(value, bool) else value
                yield f"{f.name}={text}"


R = TypeVar("R", bound=Record)


def one_of(record: Record, word: str, *known: str) -> None:
    """Raises ValueError if a word of a record says something else."""
    said = getattr(record, word)
    if said not in known:
        raise ValueError(f"{type(record).__name__}: {word} is {said!r}, not one of {', '.join(map(repr, known))}")


class _WithDefaults(dict[type[Record], Any]):
    """Records by kind, those that were not given as their defaults say, from the first question on."""

    def __missing__(self, kind: type[Record]) -> Record:
        default = self[kind] = kind()
        return default


class Rule:
    """Records by their kind; those that are not given are as their defaults say. Immutable, and equal if its records
    are.

    Args:
        records: of different kinds, in the order of the text.
        words: the same by fields of records.

    Attributes:
        derived: what readers computed of it once, each by a key of its own: rules are asked in every step.

    Raises:
        TypeError: a word that no record says, or two records of one kind.
    """

    def __init__(self, *records: Record, **words: Any) -> None:
        found = {type(one): one for one in records}
        if len(found) < len(records):
            raise TypeError(f"a rule has one record of a kind, got {records}")
        for kind in dict.fromkeys(_said_by(word) for word in words):
            own = {word: value for word, value in words.items() if _SAID_BY[word] is kind}
            found[kind] = replace(found.get(kind) or kind(), **own)
        self._given = {kind: one for kind, one in found.items() if one != kind()}
        self._all = _WithDefaults(self._given)
        self._hash = hash(frozenset(self._given.values()))
        self.derived: dict[Any, Any] = {}

    def __getitem__(self, kind: type[R]) -> R:
        found: R = self._all[kind]
        return found

    def __iter__(self) -> Iterator[Record]:
        """The records that ask for something."""
        return iter(self._given.values())

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rule) and self._given == other._given)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Rule({' '.join(word for one in self for word in one.words())})"

    def replace(self, **words: Any) -> Rule:
        """The rule with other words."""
        return Rule(*self, **words)

    def only(self, *kinds: type[Record]) -> bool:
        """Whether no record of another kind asks for anything: what an implementation asks that knows these."""
        return all(kind in kinds for kind in self._given)

    @cached_property
    def evicts(self) -> bool:
        """False when the budget is everything: nothing is scored, nothing is dropped."""
        return any(one.evicts for one in self)

    @cached_property
    def demotes(self) -> bool:
        """Whether the budget is of tokens that are held whole: the others stay too, in fewer bits."""
        return any(one.demotes for one in self)

    @cached_property
    def drops(self) -> bool:
        """Whether what is above the budget leaves its slot."""
        return self.evicts and not self.demotes

    @cached_property
    def growing(self) -> Rule:
        """The same observations, and nothing goes: the rule of calls that do not evict."""
        return Rule(*(one.growing() for one in self))

    @cached_property
    def of_steps(self) -> Rule:
        """What calls of one token do under this rule: nothing goes by itself if evictions wait."""
        return self._at(None)

    def of_call(self, position: int) -> Rule:
        """What a call of several tokens does whose first is at `position`."""
        return self._at(position)

    def _at(self, position: int | None) -> Rule:
        return self if all(one.acts(position) for one in self) else self.growing

    def encode(self) -> str:
        """Short readable text of the words that differ from their defaults; ops take a rule in this form."""
        return self._text

    @cached_property
    def _text(self) -> str:
        return " ".join([f"ops={OPS_VERSION}", *(word for one in self for word in one.words())])

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Rule:
        """Inverse of `encode`.

        Raises:
            TypeError: a word that no record says.
        """
        values: dict[str, Any] = {}
        for part in text.split():
            word, _, value = part.partition("=")
            if word != "ops":
                kind: Any = type(getattr(_said_by(word)(), word))
                values[word] = (
                    tuple(value.split("+")) if kind is tuple else bool(int(value)) if kind is bool else kind(value)
                )
        return Rule(**values)


def all_words() -> dict[str, Any]:
    """Every word that a rule may say, with its default."""
    _meet_all_records()
    return {word: getattr(kind(), word) for word, kind in sorted(_SAID_BY.items())}


def _said_by(word: str) -> type[Record]:
    if word not in _SAID_BY:
        _meet_all_records()
    if word not in _SAID_BY:
        raise TypeError(f"no record of a rule says {word!r}: known are {', '.join(all_words())}")
    return _SAID_BY[word]


@lru_cache(maxsize=1)
def _meet_all_records() -> None:
    """Import whatever may hold records: they are known from then on. Nobody lists them."""
    package = import_module("kvpass.kernels")
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "triton" not in found.name and "compile_report" not in found.name:
            import_module(found.name)
