"""Beginnings that many prompts share, computed once: a request that has one goes on from a fork of its cache.

Only the operator names them, and whoever has one always goes on from it. Under a policy that evicts, a beginning that
is compressed by itself and then extended differs from a prompt that is compressed as a whole; if what is ready depended
on earlier requests, so would answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import kvpass


@dataclass(frozen=True)
class Prefix:
    """Tokens and their cache, which is only ever forked."""

    ids: tuple[int, ...]
    cache: kvpass.Cache


class Prefixes:
    def __init__(self, known: Iterable[Prefix] = ()) -> None:
        self.known = sorted(known, key=lambda one: -len(one.ids))

    def of(self, prompt: tuple[int, ...]) -> Prefix | None:
        """The longest that a prompt begins with and goes on behind: the rest gives the first logits."""
        return next((p for p in self.known if len(p.ids) < len(prompt) and prompt[: len(p.ids)] == p.ids), None)

    @property
    def caches(self) -> list[kvpass.Cache]:
        return [one.cache for one in self.known]
