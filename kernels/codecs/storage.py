"""What the slots of a rule hold: the codecs of keys and values, and the fields of the state that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvpass.kernels.codecs.codec import Codec
from kvpass.kernels.codecs.fits import NONE, PARTS, START
from kvpass.kernels.codecs.registry import CODECS, DENSE
from kvpass.kernels.rule import Record, Rule, one_of
from kvpass.kernels.slots.state import Field

HALVES = ("k", "v")
WHOLE_AT = "whole_at"
"""The field that says which position each whole copy is of."""
_LETTERS = {"k": "PQ", "v": "RS"}
"""Dims of codes and of scales, by half; see `Storage.sizes`."""
_HELD = {"k": "K", "v": "L"}
"""Dims of what is coded of a vector."""


@dataclass(frozen=True)
class Storage(Record):
    """How slots hold keys and values.

    A coded half has its codes in fields of their own, slot by slot, and the field `k` or `v` holds whole copies of a
    few tokens instead (`kvpass.kernels.codecs.whole`).

    Attributes:
        k_as, v_as: a codec by name, or `dense`.
        scale_group: neighbouring entries that share a scale.
        rotated: whether coded halves are rotated by Hadamard matrices.
        residual: newest tokens that are held whole too.
        whole_sinks: first tokens of each row that are.
        by_score: instead of those, the tokens that the rule's budget has room for (`kvpass.kernels.codecs.chosen`):
            what it would evict is demoted to its codes, and stays.
        k_fit, v_fit: how vectors are changed before they are coded (`kvpass.kernels.codecs.fits`).
        kept_num, kept_den: share of a key's channels that is coded, where `k_fit` picks `channels`.
        atoms: of a dictionary, where a fit makes one.
    """

    k_as: str = DENSE
    v_as: str = DENSE
    scale_group: int = 64
    rotated: bool = False
    residual: int = 0
    whole_sinks: int = 0
    by_score: bool = False
    k_fit: str = NONE
    v_fit: str = NONE
    kept_num: int = 1
    kept_den: int = 1
    atoms: int = 256

    def check(self) -> None:
        one_of(self, "k_as", DENSE, *CODECS)
        one_of(self, "v_as", DENSE, *CODECS)
        one_of(self, "k_fit", *PARTS)
        one_of(self, "v_fit", NONE, "range", "atoms")

    @property
    def demotes(self) -> bool:
        return self.by_score

    @property
    def whole(self) -> int:
        """Tokens of each head that have whole copies by their number among the row's, W."""
        return self.residual + self.whole_sinks

    @property
    def copies(self) -> bool:
        """Whether some tokens have whole copies."""
        return self.by_score or self.whole > 0

    def codec(self, half: str) -> Codec | None:
        """That of keys (`k`) or values (`v`); None if they are dense."""
        return CODECS.get(self.k_as if half == "k" else self.v_as)

    @property
    def coded(self) -> tuple[str, ...]:
        """The halves that have a codec."""
        return tuple(half for half in HALVES if self.codec(half) is not None)

    @property
    def replaced_fields(self) -> dict[str, Field]:
        width = {"k": "D", "v": "V"}
        return {half: Field(half, f"BHW{width[half]}", None, 0.0) for half in self.coded}

    @property
    def state_fields(self) -> tuple[Field, ...]:
        found = [Field(WHOLE_AT, "BHW", torch.int32, -1, positions=True)] if self.coded else []
        for half in self.coded:
            codes, *scales = self.codec_of(half).parts(1, self.scale_group)
            letters = _LETTERS[half]
            found.append(Field(f"{half}_{codes.name}", f"BHC{letters[0]}", codes.dtype, None, codes=True))
            found += [Field(f"{half}_{one.name}", f"BHC{letters[1]}", one.dtype, None, codes=True) for one in scales]
            for part in PARTS[self.fit(half)]:
                dtype, fill = START[part]
                letters = "BHA" if part == "atoms" else "BH"
                found.append(Field(f"{half}_{part}", f"{letters}{_HELD[half]}", dtype, fill, codes=True))
        return tuple(found)

    def sizes(self, widths: dict[str, Any]) -> dict[str, Any]:
        """Sizes of the dims of its fields; widths: D and V, and W where copies are chosen by score: else as many as
        slots.
        """
        found: dict[str, Any] = {"W": widths.get("W", widths["C"]) if self.by_score else self.whole}
        found["A"] = self.atoms
        for half, width in zip(HALVES, (widths["D"], widths["V"]), strict=True):
            codec = self.codec(half)
            if codec is not None:
                own = self.held_width(half, width)
                parts = codec.parts(own, self.scale_group)
                found |= dict(zip(_LETTERS[half], (parts[0].size, parts[-1].size), strict=True))
                found[_HELD[half]] = own
        return found

    def fit(self, half: str) -> str:
        """The kind of a half's fit."""
        return self.k_fit if half == "k" else self.v_fit

    def held_width(self, half: str, width: int) -> int:
        """How many numbers of a half's vectors of `width` entries are coded."""
        if self.fit(half) != "channels":
            return width
        return max(width * self.kept_num // self.kept_den, 1)

    def codec_of(self, half: str) -> Codec:
        """That of a coded half."""
        codec = self.codec(half)
        assert codec is not None
        return codec

    def code_fields(self, half: str) -> tuple[str, ...]:
        """Names of the fields that hold a half's codes, in the order of the codec's parts."""
        return tuple(f"{half}_{part.name}" for part in self.codec_of(half).parts(1, self.scale_group))


def coded(rule: Rule) -> tuple[str, ...]:
    """The halves, of keys `k` and values `v`, that slots do not hold as the model has them."""
    found: tuple[str, ...] | None = rule.derived.get(coded)
    if found is None:
        found = rule.derived[coded] = rule[Storage].coded
    return found


def fit_fields(rule: Rule) -> tuple[str, ...]:
    """Names of the fields that hold fits of heads, in the order of a state's fields."""
    found: tuple[str, ...] | None = rule.derived.get(fit_fields)
    if found is None:
        storage = rule[Storage]
        names = (f"{half}_{part}" for half in coded(rule) for part in PARTS[storage.fit(half)])
        found = rule.derived[fit_fields] = tuple(names)
    return found
