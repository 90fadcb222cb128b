"""Tokens that stand before the chunks of a prompt that is read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from kvpass.errors import CacheError


@dataclass(frozen=True)
class Instruction:
    """What is said before each chunk.

    Attributes:
        first: before the first chunk.
        later: before each other one, and the `tail` last tokens of the chunk before it.
        tail: how many.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    tail: int = 8


_NONE = Instruction()
_CURRENT: ContextVar[Instruction] = ContextVar("kvpass_instruction", default=_NONE)


@contextmanager
def instructed(first: Sequence[int] = (), later: Sequence[int] | None = None, tail: int = 8) -> Iterator[None]:
    """Let prompts that are read again inside the block (policies that replay, e.g. `kvzip`) follow an instruction:
    `with kvpass.instructed(tokenizer("\\n\\nRepeat the previous context exactly.").input_ids): model.generate(..)`.

    Args:
        first: token ids before the first chunk of each call's tokens.
        later: before every other chunk; None: as `first`.
        tail: so many tokens of the chunk before come behind `later`, also where there is no instruction.

    Raises:
        CacheError: they are no token ids, or tail is no whole number from 0.
    """
    given = [_ids(first), _ids(first if later is None else later)]
    if not isinstance(tail, int) or isinstance(tail, bool) or tail < 0:
        raise CacheError(f"tail={tail!r} is no number of tokens", where="kvpass.instructed", hint="say tail=8")
    token = _CURRENT.set(Instruction(given[0], given[1], tail))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _ids(given: Any) -> tuple[int, ...]:
    ids = torch.as_tensor(given).tolist() if len(given) else []
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise CacheError("an instruction is no list of token ids", where="kvpass.instructed", hint="give input_ids[0]")
    return tuple(ids)


def instruction() -> Instruction:
    """That of the block which a call is in."""
    return _CURRENT.get()
