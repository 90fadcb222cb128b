"""A cache and what it should be: calls go to both, and what one holds is looked at by the other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from kvpass.kernels.slots.cursor import SEEN
from reliability import alone
from reliability.plain import Call, Plain, Row
from reliability.policies import compiled, policy_of
from reliability.promises import check_promises
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.api.holdings import stores

DONE: Counter[str] = Counter()
"""How often each thing was done in this process, for the page."""


class Desk:
    """A policy, its compiled model, and the lives of rows under it that are known in this example."""

    def __init__(self, policy: str) -> None:
        self.policy, self.compiled = policy, compiled(policy)
        self.spec, self.budget = policy_of(policy)
        store = self.spec.store
        self.coded = store.k != "dense" or store.v != "dense" or bool(self.spec.evicted.to)
        self.lives: dict[tuple[Call, ...], alone.Life] = {}

    def life(self, row: Row) -> alone.Life:
        if row.calls not in self.lives:
            self.lives[row.calls] = alone.life(self.policy, row, judged=not self.lives)
        return self.lives[row.calls]


class Talk:
    """One cache under a desk's policy."""

    def __init__(self, desk: Desk, cache: kvpass.Cache, plain: Plain) -> None:
        self.desk, self.cache, self.plain = desk, cache, plain

    @classmethod
    def empty(cls, desk: Desk, rows: int) -> Talk:
        cache = kvpass.Cache(DynamicCache(config=desk.compiled.config))
        return cls(desk, cache, Plain(tuple(Row() for _ in range(rows))))

    def also(self, cache: kvpass.Cache, plain: Plain) -> Talk:
        return Talk(self.desk, cache, plain)

    @property
    def rows(self) -> int:
        return len(self.plain.rows)

    def said(self, words: list[Call], run: Any = None) -> torch.Tensor:
        """Logits [rows, S, vocabulary] of the compiled model, or of another that is given this cache."""
        run, width = run or self.desk.compiled, max(map(len, words))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in words])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in words])
        before = self.plain.mask()
        mask = torch.cat([before if len(words) == self.rows else before[:1].expand(len(words), -1), mask], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        with torch.no_grad():
            logits: torch.Tensor = run(ids, **given, **with_cache(run, self.cache)).logits
        return logits

    def call(self, words: list[Call]) -> None:
        """As many tokens as each row has words."""
        self.plain = self.plain.told(words, list(self.said(words)[:, -1]))
        self.look("calls")

    def draft(self, words: list[Call], depth: int) -> None:
        """Equally many tentative tokens for each row, in one call."""
        with kvpass.tentative(depth=depth):
            heard = self.said(words)
        self.drafted(words, list(heard.unbind(1)), depth)
        self.look("drafts")

    def drafted(self, words: list[Call], heard: list[torch.Tensor], depth: int) -> None:
        """Tentative tokens that came: the first ones of `words`, as many as were heard of."""
        most = max(depth, len(words[0]))
        for at, logits in enumerate(heard):
            loose = min(self.plain.loose + 1, most)
            self.plain = self.plain.told([(row[at],) for row in words], list(logits), loose)

    def snapshot(self) -> list[torch.Tensor]:
        """Positions, keys, values and scores of all live slots."""
        parts = ((one.positions, one.keys, one.values, one.scores.nan_to_num()) for one in self.cache)
        return [tensor for part in parts for tensor in part]

    def look(self, what: str) -> None:
        """All that can be said of a cache by its tensors and its rows' columns."""
        DONE[what] += 1
        cache, plain = self.cache, self.plain
        assert (cache.tokens, cache.rows) == (plain.width, len(plain.rows))
        assert cache.host.get_seq_length() == plain.width
        assert cache.padding.tolist() == [min(row.columns) for row in plain.rows]
        for row, layers in zip(plain.rows, alone.held_of(cache.host, plain.rows), strict=True):
            held = [[head.numbers for head in heads] for heads in layers]
            check_promises(self.desk.spec, self.desk.budget, held, plain, row)
        for store in stores(cache.host):
            seen = [[len(row.columns)] * store.state.cursor.shape[1] for row in plain.rows]
            assert store.state.cursor[..., SEEN].tolist() == seen

    def leave(self) -> None:
        """Each row holds and said what its calls make of an empty cache."""
        for b, held in enumerate(alone.held_of(self.cache.host, self.plain.rows)):
            row = self.plain.rows[b]
            life = self.desk.life(row)
            why = alone.difference(held, life.held, self.desk.coded)
            DONE["rows lived again"] += 1
            DONE["near ties"] += why == "a near tie"
            assert why in ("", "a near tie"), f"row {b}: {why}"
            for at, (got, want) in enumerate(zip(row.heard, life.heard, strict=True)):
                good = why or got is None or alone.same_words(got, want, self.desk.coded)
                assert good, f"row {b} heard something else from call {at} than alone"
