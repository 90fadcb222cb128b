"""A policy file of a user's own that composes what no paper does: checked by the command, and equal to an oracle that
is composed of the same parts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny
from oracle.base import Memory, Row, Sight
from oracle.drive import Conversation
from oracle.policies import H2O, SnapKV
from oracle.smooth import pooled
from oracle.weights import Weighted, vo_l1
from oracle.windowed import Fair

import kvpass
from kvpass.api.cli import main

pytestmark = pytest.mark.usefixtures("one_trace")

Array = np.ndarray

FILE = """
name: mine
extends: h2o                                    # sums of all queries' attention
statistic: {across_calls: fresh}                # of the latest call of several tokens, and of generated tokens
pool: {kind: max, size: 5}                      # smoothed over neighbours
weight: {by: vo_l1, floor: 1.0e-4}              # times what the value gives to the output
allocate: {heads: flat, safeguard: 0.2}         # heads share a layer's budget
protect: {sinks: 4, recent: 0.25, tokens: true} # sinks, recent tokens, and what the caller marks
"""
MARKED = [7, 31, 32, 33, 90]


class Mine(Weighted, H2O):
    safeguard = Fraction(2, 10)
    floor = 1e-4

    def observe(self, memory: Memory, rows: Array, sees: Array, row: Row, candidates: Array) -> None:
        if len(row.valid) == 1:
            memory.sum = memory.sum + rows[row.valid].sum(0)
            return
        memory.sum = rows[row.valid].sum(0)
        memory.sum[candidates] = pooled(memory.sum[candidates], np.ones(len(candidates), dtype=bool), "max", 5)

    def weigh(self, sight: Sight) -> Array:
        return vo_l1(sight)

    def protected(self, positions: Array, row: Row, n: int) -> Array:
        ends = (positions < row.first + 4) | (positions >= row.end - n // 4)
        return ends | np.isin(positions, MARKED)


def test_a_composed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows, a prompt, 40 steps, a second turn: positions of every head after every call."""
    file = tmp_path / "mine.yaml"
    file.write_text(FILE)
    assert main(["policies", "check", str(file)]) == 0
    model = tiny.one_llama(6, 2)
    keep = torch.zeros(2, 150, dtype=torch.bool)
    keep[:, MARKED] = True
    conversation = Conversation(model, str(file), 48, meaning=Mine(), inner="eager")
    with kvpass.marked(keep=keep):
        token = conversation.call(tiny.tokens(2, 150))
        token = conversation.decode(token, 40)
        token = conversation.call(torch.cat([token, tiny.tokens(2, 29, seed=1)], 1))
        conversation.decode(token, 3)
    simulator = conversation.simulator
    assert simulator.near_ties <= 0.005 * simulator.compared
    for view in kvpass.inspect(conversation.cache).layers:
        counts = (view.positions >= 0).sum(-1)
        assert counts.sum(-1).tolist() == [2 * 48, 2 * 48]
        assert all(set(MARKED) <= set(head) for row in view.positions.tolist() for head in row)


class Whitelisted(SnapKV):
    def protected(self, positions: Array, row: Row, n: int) -> Array:
        return super().protected(positions, row, n) | np.isin(positions, MARKED)


def test_a_whitelist() -> None:
    keep = torch.zeros(1, 150, dtype=torch.bool)
    keep[:, MARKED] = True
    conversation = Conversation(tiny.one_llama(6, 2), "whitelist", 48, meaning=Whitelisted(), inner="eager")
    with kvpass.marked(keep=keep):
        conversation.decode(conversation.call(tiny.tokens(1, 150)), 40)
        conversation.call(tiny.tokens(1, 60, seed=1))


def test_fair_spans() -> None:
    """Three spans of unlike length, a second turn that belongs to the first."""
    spans = torch.zeros(1, 150, dtype=torch.long)
    spans[:, 40:60], spans[:, 60:100] = 1, 2
    meaning = Fair()
    meaning.spans = spans[0].numpy()
    conversation = Conversation(tiny.one_llama(6, 2), "fair", 64, meaning=meaning, inner="eager")
    with kvpass.marked(spans=spans):
        conversation.decode(conversation.call(tiny.tokens(1, 150)), 40)
        conversation.call(tiny.tokens(1, 60, seed=1))
