"""The table of scorers: functions that give each key of a layer a score, by name.

A policy whose `score` is such a name is ranked by it. Users add their own with `kvpass.scorer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from urllib.parse import quote, unquote

import torch
from kvpass.kernels.errors import DataError, ScorerError
from kvpass.kernels.rank.criterion import SCORES
from kvpass.kernels.rank.scorers.seen import READS, Seen
from torch import Tensor

BUILT_IN = (
    *("geometry", "expected", "lag", "learned", "window", "redundancy", "chance", "needs", "leverage", "replay"),
    "reach",
)
"""Modules of this package that hold scorers."""

_TABLE: dict[str, Scorer] = {}

LARGEST = 1e37
"""Scores are smaller than this: what stays for other reasons is ranked above (`kvpass.kernels.rank.scored`)."""


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Attributes:
        run: (Seen, **options) -> float [B, Hkv, L], higher = keep; any finite value.
        reads: of `READS`.
        pointwise: a key's score depends on that key, its value and its position alone, so that a generated token gets
            its own when it arrives. Of other scorers generated tokens stay until no others are left, the oldest goes
            first.
        options: names and defaults of the options, from the function's signature.
        preference: what a layer deserves next to others, Seen -> float [B] >= 0, for `allocate.layers: preference`.
        tensors: what the file in the option `file` holds, by name: the letters of a tensor's dims, from `layers Hkv D
            Dv size` (of the hidden states), or any other word; a file is checked against them and against the model.
        each: a head's scores depend on that head alone, and not on its number: under tensor parallelism ranks need not
            tell each other what it reads.
    """

    name: str
    run: Callable[..., Tensor]
    reads: tuple[str, ...]
    pointwise: bool
    options: dict[str, Any]
    preference: Callable[[Seen], Tensor] | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    each: bool = False

    @property
    def about(self) -> str:
        """The first paragraph of the function's docstring."""
        return " ".join((self.run.__doc__ or "").split("\n\n")[0].split())

    def score(self, seen: Seen, options: str) -> Tensor:
        """float32 [B, Hkv, L] for options as `encode_options` writes them.

        Raises:
            ScorerError: the function failed, or gave what are no finite scores of that shape.
        """
        value: Tensor = self._called(self.run, seen, decode_options(options))
        self._check(value, list(seen.pos.shape), "[B, Hkv, L]")
        if self._own:
            _check_finite(value, seen.candidate, self)
        return value.float()

    def prefer(self, seen: Seen) -> Tensor:
        """What the layer deserves: float [B].

        Raises:
            ScorerError: the function failed, or gave something else.
        """
        assert self.preference is not None
        value: Tensor = self._called(self.preference, seen, {})
        self._check(value, [seen.pos.shape[0]], "[B]")
        return value

    @property
    def where(self) -> str:
        """File and line of the function."""
        code = getattr(inspect.unwrap(self.run), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(self.run)

    @property
    def _own(self) -> bool:
        """Whether a user wrote it: kvpass' own give finite scores for finite inputs."""
        return not self.run.__module__.startswith("kvpass.")

    def _called(self, function: Callable[..., Any], seen: Seen, options: dict[str, Any]) -> Any:
        try:
            return function(seen, **options)
        except (DataError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"scorer {self.name!r} ({self.where}) raised {type(error).__name__}: {error}"
            fix = getattr(error, "hint", "") or f"mend the function; it sees {_shapes(seen)}"
            raise ScorerError(what, fix) from error

    def _check(self, value: Any, wanted: list[int], letters: str) -> None:
        given = _given(value)
        if isinstance(value, Tensor) and value.is_floating_point() and list(value.shape) == wanted:
            return
        what = f"scorer {self.name!r} ({self.where}) gave {given}, not a float tensor {letters} = {wanted}"
        is_number = isinstance(value, Tensor) and list(value.shape) == wanted and not value.is_complex()
        raise ScorerError(what, "return scores.float()" if is_number else f"return a float for each of {letters}")


def _given(value: Any) -> str:
    """What a function gave, for people."""
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _shapes(seen: Seen) -> str:
    batch, heads, length = seen.pos.shape
    return f"B={batch}, Hkv={heads}, L={length}"


def _check_finite(value: Tensor, candidate: Tensor, scorer: Scorer) -> None:
    """Raises ScorerError if a key that may stay has no usable score; on a GPU the device asserts it."""
    good = (value.abs() < LARGEST) | ~candidate
    if value.device.type != "cpu":
        torch._assert_async(good.all(), f"scorer {scorer.name!r} gave NaN or infinite scores")
    elif not bool(good.all()):
        first = value[~good][0].item()
        what = f"scorer {scorer.name!r} ({scorer.where}) gave {int((~good).sum())} scores that are no numbers: {first}"
        hint = f"scores are finite, below {LARGEST:.0e}: torch.nan_to_num, or -1e30 for what shall go first"
        raise ScorerError(what, hint)


def scorer(
    name: str,
    reads: tuple[str, ...] | list[str] = (),
    pointwise: bool = False,
    preference: Callable[[Seen], Tensor] | None = None,
    tensors: dict[str, str] | None = None,
    heads: str = "all",
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a torch function as a scorer that policies can use by name.

    The function takes a `Seen` and keyword options with defaults (bool, int, float or str), and returns scores
    [B, Hkv, L]. It runs outside of the compiler, so plain torch and Python will do. A policy says `score: NAME` and,
    if need be, `options: {...}`.

    Args:
        name: as policies write it.
        reads: what it asks for, nothing else is computed: of `keys`, `values`, `hidden`, `queries` (before their
            rotation), `rows` or `logits` (of the observation window), `statistics`, `layer` (its number), `places`
            (which of its row's valid tokens a key is), `marks` (of the caller), `own` (the call's tokens alone, older
            slots keep their scores).
        pointwise: a key's score depends on that key, its value and its position alone, so that a generated token gets
            its own when it arrives; of other scorers generated tokens stay until no others are left.
        tensors: sizes by name of what its weight file holds, see `Scorer`.
        preference: what a layer deserves next to others, Seen -> float [B] >= 0, for `allocate.layers: preference`.
        heads: `each` if a head's scores depend on that head alone, and not on its number: ranks then exchange nothing
            for it (docs/parallel.md). `all`: it is shown all heads of the layer, whichever ranks they lie on.

    Raises:
        ValueError: no name, or one that is taken, an unknown word in `reads`, a parameter without a default or with
            one of another kind, `hidden` without `pointwise`.
    """

    if not isinstance(name, str):
        raise ValueError("a scorer has a name: @kvpass.scorer('loud')")

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if isinstance(reads, str):
            raise ValueError(f"scorer {name!r}: reads is a tuple of words: reads=({reads!r},)")
        if heads not in ("each", "all"):
            raise ValueError(f"scorer {name!r}: heads is 'each' or 'all', not {heads!r}")
        unknown = [word for word in reads if word not in READS]
        if unknown:
            raise ValueError(f"scorer {name!r}: cannot read {unknown[0]!r}; choose from {', '.join(READS)}")
        if not name.isidentifier() or name in SCORES:
            raise ValueError(f"scorer {name!r}: give a word that is no statistic's")
        known = _TABLE.get(name)
        if known is not None and known.run.__qualname__ != run.__qualname__:
            raise ValueError(f"scorer {name!r}: the name is taken by {known.run.__module__}.{known.run.__qualname__}")
        if "hidden" in reads and not pointwise:
            raise ValueError(f"scorer {name!r}: hidden states are seen once, when a token comes: say pointwise=True")
        parameters = list(inspect.signature(run).parameters.values())[1:]
        missing = [p.name for p in parameters if p.default is p.empty]
        if missing:
            raise ValueError(f"scorer {name!r}: give its option {missing[0]!r} a default")
        options = {p.name: p.default for p in parameters}
        odd = [option for option, value in options.items() if type(value) not in (bool, int, float, str)]
        if odd:
            raise ValueError(f"scorer {name!r}: its option {odd[0]!r} is no bool, int, float or str")
        files, each = dict(tensors or {}), heads == "each"
        _TABLE[name] = Scorer(name, run, tuple(reads), pointwise, options, preference, files, each)
        return run

    return register


def scorers() -> dict[str, Scorer]:
    """All scorers by name."""
    for module in BUILT_IN:
        import_module(f"kvpass.kernels.rank.scorers.{module}")
    return dict(sorted(_TABLE.items()))


def find_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        KeyError: none has it.
    """
    return _TABLE[name] if name in _TABLE else scorers()[name]


def encode_options(options: dict[str, Any]) -> str:
    """Options as a word for a rule's text, `decode_options` reads it back."""
    return ",".join(f"{key}:{type(value).__name__}:{quote(str(value))}" for key, value in sorted(options.items()))


def decode_options(text: str) -> dict[str, Any]:
    """The inverse of `encode_options`."""
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": lambda x: x == "True"}
    parts = (part.split(":", 2) for part in text.split(",") if part)
    return {key: kinds[kind](unquote(value)) for key, kind, value in parts}
