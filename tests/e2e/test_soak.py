"""The soak (tests/reliability/soak.py) for some seconds: memory stays, nothing is compiled anew. `make reliability`
runs it for 20,000 tokens and 300 conversations.
"""

from __future__ import annotations

import pytest
import torch
from reliability.soak import Found, Text, conversations


def test_a_long_text() -> None:
    text = Text(400)
    found = text.soak(readings=6)
    found.check()
    assert len(found.live) >= 6
    assert text.judged(samples=40) <= 2


def test_short_conversations() -> None:
    conversations(24).check()


def test_the_readings_see_a_leak() -> None:
    """Of a kilobyte per reading."""
    found, leak = Found(), []
    for at in range(3):
        leak.append(torch.ones(1024))
        found.read(at)
    with pytest.raises(AssertionError, match="live bytes"):
        found.check()
