"""Draws from the grammar: each is matched, exact and evicting, or declined for the reason that the grammar predicts."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from spellings.check import POLICIES, check
from spellings.spelling import CHOICES, Spelling, draw, leaning, nearby, objection, parse

CHUNKS, DRAWS = 15, 20
"""A draw costs 2 s: three traces of Dynamo. More by command: `make spellings`."""

PHASES = (Phase.generate,)
"""A failure is not shrunk: that takes minutes, and a draw differs from the plainest decoder in a few choices only."""


@st.composite
def spellings(choose: st.DrawFn) -> Spelling:
    """Half of all choices are the plainest, as in run.py."""
    return draw(lambda options: choose(st.one_of(st.just(options[0]), st.sampled_from(options))))


@pytest.mark.some(7)  # 140 draws; `make wide` has the rest
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_decoders(chunk: int) -> None:
    wrong = []

    @seed(chunk)
    @settings(max_examples=DRAWS, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=PHASES)
    @given(spellings(), st.sampled_from(POLICIES))
    def draws(spelling: Spelling, policy: str) -> None:
        outcome = check(spelling, policy, shared=True)
        again = f'python -P tests/spellings/run.py --only "{spelling!r}"'
        if outcome.failed:
            wrong.append(f"{outcome.kind}: {outcome.reason} ({policy})\n{outcome.text}\n{again}")

    draws()
    assert not wrong, "\n\n".join(wrong)


def test_a_spelling_is_read_as_it_is_written() -> None:
    for number in range(200):
        spelling = draw(leaning(random.Random(number)))
        assert objection(spelling) == ""
        assert parse(repr(spelling)) == spelling


def test_nearby_spellings_cover_every_option() -> None:
    """So that a grammar that loses an option is seen."""
    from spellings.spelling import EVERY

    found = {(field, getattr(one, field)) for one in nearby() for field in CHOICES}
    assert found == {(field, option) for field, options in EVERY.items() for option in options}


def test_a_wrong_decoder_is_found_out() -> None:
    """The generator can fail: a decoder that hides nothing is not what the oracle takes it for."""
    from spellings import masking

    kept = masking.MASKS["tril"]
    masking.MASKS["tril"] = lambda square, place, count, length: kept(square, place, count, length) | True
    try:
        with pytest.raises(AssertionError, match="not close"):
            check(Spelling())
    finally:
        masking.MASKS["tril"] = kept
