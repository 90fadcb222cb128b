"""Rules as records: who says a word, what is refused, what a rule asks of all its records."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
from kvpass.kernels.budget import Budget, budget
from kvpass.kernels.rank.smooth import Pool
from kvpass.kernels.rule import Record, Rule
from kvpass.kernels.timing import Timing


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"pool": "sum"}, "Pool: pool is 'sum', not one of 'none', 'avg', 'max'"),
        ({"when": "never"}, "Timing: when is 'never'"),
        ({"group": "sum"}, "Observation: group is 'sum'"),
        ({"share": "evenly"}, "ShareOut: share is 'evenly'"),
    ],
)
def test_a_record_checks_its_words(words: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Rule(**words)
    (word,) = words
    with pytest.raises(ValueError, match=text):
        Rule.parse(f"{word}={words[word]}")


def test_a_word_that_nobody_says() -> None:
    with pytest.raises(TypeError, match="no record of a rule says 'taper': known are apart, atoms, beta"):
        Rule(taper=20)


def test_a_word_that_is_anothers() -> None:
    with pytest.raises(TypeError, match=r"the word 'pool_size' of .*Mine is Pool's"):

        @dataclass(frozen=True)
        class Mine(Record):
            pool_size: int = 3


def test_two_records_of_a_kind() -> None:
    with pytest.raises(TypeError, match="one record of a kind"):
        Rule(Budget(9), Budget(8))


def test_records_and_words_are_the_same() -> None:
    assert Rule(Pool("max", 7), Budget(9)) == Rule(slots=9, pool_size=7, pool="max") != Rule(slots=9)
    assert Rule(Pool("max", 7)).replace(pool_size=5)[Pool] == Pool("max", 5)
    assert Rule(Pool()) == Rule()
    assert Rule(Budget(9)).only(Budget)
    assert not Rule(Budget(9), Pool("avg", 3)).only(Budget)


def test_what_is_left_when_nothing_goes() -> None:
    rule = Rule(Pool("max", 7), Budget(0, 1, 5, 64), Timing("first"))
    assert rule.of_call(0) is rule
    assert rule.of_call(9) is rule.growing is rule.of_steps
    assert not rule.growing.evicts
    assert rule.growing[Pool] == rule[Pool]
    assert budget(rule.growing, 1000) == 1000


def test_a_text_finds_its_records_in_a_new_process() -> None:
    """Nothing but the rule is imported: the word's record is looked for."""
    code = "from kvpass.kernels.rule import Rule; print(Rule.parse('ops=3 rings=4 pool=max pool_size=7'))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Rule(rings=4 pool=max pool_size=7)\n"
