"""Windows of a text: disjoint, of one size, held-out ones from its last quarter."""

from __future__ import annotations

import pytest

from kvpass.errors import PolicyError
from kvpass.tune.windows import SHORTEST, windows_of


@pytest.mark.parametrize("length", [960, 1000, 3333, 40_000])
@pytest.mark.parametrize("head", [(), (-7,)])
def test_windows_are_pieces_of_the_text_apart_from_each_other(length: int, head: tuple[int, ...]):
    tokens = range(length)  # a token is its place
    cut = windows_of(tokens, 256, 64, head)
    windows = (*cut.search, *cut.held_out)
    assert len(cut.search) >= 2
    assert len(cut.held_out) >= 2
    last = -1
    for window in windows:
        body = window.prompt[len(head) :]
        assert window.prompt[: len(head)] == head
        assert len(window.prompt) == cut.context <= 256
        assert len(window.next) == cut.after == 64
        assert (*body, *window.next) == tuple(range(body[0], body[0] + cut.context - len(head) + 64))
        assert body[0] > last
        last = window.next[-1]
        for passage in window.passages:
            at = window.prompt.index(passage[0])
            assert window.prompt[at : at + 64] == passage
    assert len(windows[0].passages) == 2
    first_held = cut.held_out[0].prompt[len(head)]
    assert cut.search[-1].next[-1] < first_held
    assert first_held >= length - max(length // 4, 2 * (cut.context + 64))


def test_short_texts_have_short_prompts_and_too_short_ones_are_refused():
    assert windows_of(range(5 * (SHORTEST + 64)), 1024).context == SHORTEST
    with pytest.raises(PolicyError, match=r"the text has 959 tokens, too few[^$]*give a text of 960 tokens or more"):
        windows_of(range(959), 1024)
