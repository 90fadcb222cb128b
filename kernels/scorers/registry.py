"""The table of scorers: functions that give each key of a layer a score, by name.

A policy whose `score` is such a name is ranked by it. Users add their own with `kvpass.scorer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import torch
from kvpass.kernels.errors import DataError, ScorerError
from kvpass.kernels.rule import SCORES
from torch import Tensor

READS = ("keys", "values", "hidden", "queries", "rows", "logits", "statistics", "layer", "marks", "own", "places")
"""What a scorer may ask for. `hidden`: what the attention block reads; `queries`: before their rotation; `rows` and
`logits`: of the observation window; `statistics`: what attention emitted; `marks`: of the caller; `layer`: its number,
which costs that layers no longer share what is computed for a graph; `own`: the call's tokens alone, scores of older
slots stay (as with `hidden`); `places`: `Seen.pos` exactly, which costs a number per slot.
"""

BUILT_IN = ("geometry", "expected", "lag", "learned", "window", "redundancy", "chance", "needs", "leverage")
"""Modules of this package that hold scorers."""

_TABLE: dict[str, Scorer] = {}

Asked = TypeVar("Asked", Tensor, int)

LARGEST = 1e37
"""Scores are smaller than this: what stays for other reasons is ranked above (`kvpass.kernels.held`)."""


class _Unsaid(ValueError):
    """A scorer asks `Seen` for what it did not say that it reads."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Seen:
    """What a scorer sees: the L keys of one layer at the end of a call, in position order.

    Attributes:
        pos: int32 [B, Hkv, L]: which of its row's valid tokens each key is, from 0; -1 = empty or padding. Without
            `places`, in a row with padding between its tokens, older slots' may be too high, in the same order.
        candidate: bool [B, Hkv, L]: keys that may stay; padding and empties may not, and must not sway a score.
        end: int [B, Hkv, 1]: one past the last candidate's.
        first: int [B, Hkv, 1]: 0, the row's first valid token.
        seen: int64 [B, Hkv, 1]: valid tokens so far.
        budget: int64 [B, Hkv, 1]: slots that each head may hold, on average over the heads.
        window: queries of the observation window; 0 for none.
        seed: of the policy.
        k, v: [B, Hkv, L, D or Dv], as cached (keys rotated). None if not asked for.
        rows: float32 [B, Hkv, G, w, L], probabilities of the last w valid queries (0 where hidden, and for missing
            queries), or their masked, scaled logits (-inf where hidden) for a scorer that reads `logits`.
        statistics: float32 [B, Hkv, L] by name, of this call.
        h: [B, L, size], hidden states that the block's values are projected from. Only of the call's own tokens, so a
            scorer that reads them sees no others (L is S), and scores of older slots stay.
        q: [B, Hq, S, D], this call's queries before their rotation (RoPE, half-turned).
        turns: [2, 1 or B, S, D], cosines and sines that they are rotated by.
        at: the layer's number, from 0.
        stay: bool [B, Hkv, L], keys that the caller marked to keep.
    """

    pos: Tensor
    candidate: Tensor
    end: Tensor
    first: Tensor
    seen: Tensor
    budget: Tensor
    window: int
    seed: int
    k: Tensor | None
    v: Tensor | None
    rows: Tensor | None
    statistics: dict[str, Tensor]
    h: Tensor | None = None
    q: Tensor | None = None
    turns: Tensor | None = None
    at: int | None = None
    stay: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """float32 [B, Hkv, L, D]"""
        return _asked(self.k, "keys").float()

    @property
    def values(self) -> Tensor:
        """float32 [B, Hkv, L, Dv]"""
        return _asked(self.v, "values").float()

    @property
    def hidden(self) -> Tensor:
        """float32 [B, L, size]"""
        return _asked(self.h, "hidden").float()

    @property
    def queries(self) -> Tensor:
        """float32 [B, Hkv, G, S, D]"""
        grouped: Tensor = _asked(self.q, "queries").float().unflatten(1, (self.pos.shape[1], -1))
        return grouped

    @property
    def angles(self) -> Tensor:
        """[2, 1 or B, S, D]"""
        return _asked(self.turns, "queries")

    @property
    def observed(self) -> Tensor:
        """float32 [B, Hkv, G, w, L]: `rows`"""
        return _asked(self.rows, "rows")

    @property
    def layer(self) -> int:
        """The site's layer, from 0."""
        return _asked(self.at, "layer")

    @property
    def marked(self) -> Tensor:
        """bool [B, Hkv, L]"""
        return _asked(self.stay, "marks")

    @property
    def before_window(self) -> Tensor:
        """bool [B, Hkv, L]: candidates that came before the observation window."""
        return self.candidate & (self.pos < self.end - self.window)


def _asked(value: Asked | None, word: str) -> Asked:
    """What a scorer reads.

    Raises:
        _Unsaid: it did not say so.
    """
    if value is None:
        raise _Unsaid(f"it reads {word!r} without saying so", f"register it with reads=({word!r}, ...)")
    return value


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
    """

    name: str
    run: Callable[..., Tensor]
    reads: tuple[str, ...]
    pointwise: bool
    options: dict[str, Any]
    preference: Callable[[Seen], Tensor] | None = None
    tensors: dict[str, str] = field(default_factory=dict)

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
        except DataError:
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

    Raises:
        ValueError: no name, or one that is taken, an unknown word in `reads`, a parameter without a default or with
            one of another kind, `hidden` without `pointwise`.
    """

    if not isinstance(name, str):
        raise ValueError("a scorer has a name: @kvpass.scorer('loud')")

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if isinstance(reads, str):
            raise ValueError(f"scorer {name!r}: reads is a tuple of words: reads=({reads!r},)")
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
        _TABLE[name] = Scorer(name, run, tuple(reads), pointwise, options, preference, dict(tensors or {}))
        return run

    return register


def scorers() -> dict[str, Scorer]:
    """All scorers by name."""
    for module in BUILT_IN:
        import_module(f"kvpass.kernels.scorers.{module}")
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


def mean_of(value: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dim but one of value [B, Hkv, L, D] where mask [B, Hkv, L]: [B, Hkv, 1, D]."""
    weight = mask[..., None].float()
    return (torch.where(weight > 0, value, 0.0)).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
