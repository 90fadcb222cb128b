"""Which policy of kvpass stands beside which press of kvpress. Names only: both environments and the page read it."""

from __future__ import annotations

from quality.versus import FIRST_CALL, LIKE_PEER, PEER

KINDS = ("prompt", "steps")
"""What is compressed: a prompt, in one go; or a text that comes token by token."""

BEST = PEER + "best"
"""Whichever press of one pass has the least NLL in the same table: chosen afterwards, in kvpress' favour."""

REPLAYS = ("kvzip", "kvzip_plus")
"""Presses that read the prompt again."""

UNPAIRED = ("knorm",)
"""Presses that are measured as candidates for BEST, and have no twin among the measured."""

OWN = ("kvpass", "reach")
"""kvpass' own policy of one pass, under its name and an earlier one."""

PROMPT = {
    "kvzip" + LIKE_PEER: PEER + "kvzip",
    "kvzip": PEER + "kvzip",
    "retold": PEER + "kvzip",
    **{name + LIKE_PEER: PEER + name for name in ("snapkv", "ada_snapkv", "critical_ada", "chunkkv", "ada_expected")},
    **{name + FIRST_CALL: PEER + name for name in ("expected_attention", "keydiff")},
    **dict.fromkeys(OWN, BEST),
    "kvzip_plus" + LIKE_PEER: PEER + "kvzip_plus",
}
STEPS = {
    **{name: PEER + name for name in ("snapkv", "keydiff")},
    "h2o": BEST,
    **dict.fromkeys(OWN, BEST),
}
PAIRS = {"prompt": PROMPT, "steps": STEPS}


def theirs(kind: str) -> list[str]:
    """kvpress' rows, each once."""
    found = dict.fromkeys(name for name in PAIRS[kind].values() if name != BEST)
    return [*found, *(PEER + name for name in UNPAIRED)]


def refused(model: str, policy: str) -> str:
    """Why kvpress cannot do this; empty if it can."""
    if model == "gemma" and policy.removeprefix(PEER) in REPLAYS:
        return "kvpress' KVzipPress raises for Gemma 3"
    return ""
