"""Anything in any order on a cache, against lists (tests/reliability/machine.py): 200 examples that are always the
same, under a policy for each way in which slots lie and change. `make reliability` draws 2,000 others, under all.
"""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test
from reliability.machine import machine, settings_of
from reliability.policies import FEW
from reliability.talk import DONE


@pytest.mark.usefixtures("one_trace")
def test_anything_in_any_order() -> None:
    DONE.clear()
    run_state_machine_as_test(machine(FEW), settings=settings_of(200))
    assert DONE["near ties"] <= 0.01 * DONE["rows lived again"]
    assert all(DONE[f"under {name}"] for name in FEW)
