"""Merging by hand: the vectors of shared/policies-2.md S7 and more, through the op and through a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.compact_slots import compact_slots
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.exits.gates import lucky, moved
from kvpass.kernels.exits.merge_slots import merge_slots
from kvpass.kernels.exits.record import BAR, MERGED, NO_BAR, Merge
from kvpass.kernels.rank.scored import Scoring
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import BIAS
from kvpass.kernels.slots.state import State
from torch import Tensor

INF = float("inf")


def merged(
    keys: list[list[float]],
    values: list[list[float]],
    score: list[float],
    kept: list[int],
    rule: Rule,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, State]:
    """Keys and values of the slots of one head after a call of several tokens, and the state."""
    k, v = (torch.tensor(x, dtype=dtype)[None, None] for x in (keys, values))
    state = State.empty(rule, k, B=1, H=1, C=len(kept) + 2, D=k.shape[3], V=v.shape[3])
    for name in ("k", "v"):
        state[name].fill_(float("nan"))  # what nobody wrote
    cursor = torch.tensor([[[len(kept), len(kept), len(keys), 0]]], dtype=torch.int32)
    idx = torch.tensor([[kept]], dtype=torch.int32)
    stats = torch.zeros(state.stats.shape[0], 1, 1, len(keys))
    compact_slots(
        [k, v, None, stats, *[None] * (len(state.per_slot()) - 4)], idx, cursor, state.tensors(), rule.encode()
    )
    merge_slots(k, v, torch.tensor([[score]]), stats, idx, state.tensors(), rule.encode())
    return state.k[0, 0, : len(kept)], state.v[0, 0, : len(kept)], state


def close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-6)


D2O = Rule(
    merge_into="nearest_key",
    merge_halves="both",
    merge_weight="cosine",
    merge_mean="count",
    merge_gate="moving",
    slots=1,
)
KVMERGER = Rule(
    merge_into="run",
    merge_halves="both",
    merge_weight="gaussian",
    merge_sigma=5.0,
    merge_least=0.75,
    merge_at="calls",
    slots=1,
)


def test_d2o() -> None:
    """S7.2: k_e = [0, 2] into k_t = [2, 2]: cosine .707107, merged [1, 1.707107]."""
    k, v, state = merged([[2.0, 2.0], [0.0, 2.0]], [[2.0, 2.0], [0.0, 2.0]], [2.0, 1.0], [0], D2O)
    close(k, [[1.0, 1.707107]])
    close(v, [[1.0, 1.707107]])
    close(state[BAR], [[0.707107]])


def test_the_bar_moves_half_way() -> None:
    close(moved(torch.tensor(NO_BAR), torch.tensor(0.6)), 0.6)
    close(moved(torch.tensor(0.6), torch.tensor(0.2)), 0.4)


def test_kvmerger() -> None:
    """S7.1: a pivot [1, 0] and [.8, .6], [.6, .8]: g 1, .992032, .984127, k = [.801067, .464532]."""
    keys = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]]
    k, v, _ = merged(keys, keys, [3.0, 1.0, 1.0], [0], KVMERGER)
    close(k, [[0.801067, 0.464532]])
    close(v, [[0.801067, 0.464532]])


def test_runs_end_at_protected_tokens_and_at_unlike_neighbours() -> None:
    """Four alike keys, of which the second is protected; a fifth that is not. Each run has its own pivot."""
    keys = [[1.0, 0.0]] * 4 + [[0.0, 1.0]]
    values = [[1.0], [10.0], [100.0], [300.0], [1000.0]]
    _, v, _ = merged(keys, values, [1.0, INF, 2.0, 3.0, 4.0], [1, 3, 4], KVMERGER)
    close(v, [[10.0], [200.0], [1000.0]])  # the first is a run without a pivot that stays


def test_merging_press() -> None:
    """Cosine .8, norms 3 and 1: weight .8 * 3 / 4 = .6; value (1 + .6 * 3) / 1.6 = 1.75. Keys stay bit for bit."""
    k, v, _ = merged(
        [[1.0, 0.0], [0.8, 0.6], [0.0, 5.0]],
        [[1.0], [3.0], [7.0]],
        [2.0, 1.0, 3.0],
        [0, 2],
        Rule(merge_into="nearest_key", slots=2),
    )
    close(v, [[1.75], [7.0]])
    assert k.tolist() == [[1.0, 0.0], [0.0, 5.0]]


def test_a_threshold_and_tokens_of_nobody() -> None:
    """Below the threshold nothing is merged, nor what is no candidate (padding, the caller's dropped tokens)."""
    rule = Rule(merge_into="nearest_key", merge_weight="even", merge_least=0.7, slots=1)
    _, v, _ = merged(
        [[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [1.0, 0.0]], [[1.0], [5.0], [3.0], [9.0]], [9.0, 1.0, 1.0, -INF], [0], rule
    )
    close(v, [[2.0]])


def test_nearest_positions() -> None:
    """R8 with kept 0, 3, 6 of 7: 1 to 0, 2 to 3, 4 to 3 and 5 to 6; means with the slot's own."""
    rule = Rule(stats=("number",), merge_into="nearest_position", merge_weight="even", slots=3)
    k = torch.zeros(1, 1, 7, 1)
    v = torch.tensor([[[[0.0], [10.0], [20.0], [30.0], [40.0], [50.0], [60.0]]]])
    state = State.empty(rule, k, B=1, H=1, C=4, D=1, V=1)
    idx, stats = torch.tensor([[[0, 3, 6]]], dtype=torch.int32), torch.arange(7.0).view(1, 1, 1, 7)
    cursor = torch.tensor([[[3, 3, 7, 0]]], dtype=torch.int32)
    compact_slots([k, v, None, stats], idx, cursor, state.tensors(), rule.encode())
    merge_slots(k, v, torch.zeros(1, 1, 7), stats, idx, state.tensors(), rule.encode())
    close(state.v[0, 0, :3], [[5.0], [30.0], [55.0]])


def test_one_slot_for_all() -> None:
    """Of 6 tokens after 1 sink: what goes is averaged with the second token."""
    rule = Rule(sinks=2, merge_into="one_slot", merge_weight="even", slots=3)
    _, v, state = merged(
        [[1.0]] * 6, [[0.0], [1.0], [2.0], [3.0], [4.0], [9.0]], [INF, INF, 1.0, 1.0, 1.0, INF], [0, 1, 5], rule
    )
    close(v, [[0.0], [2.5], [9.0]])
    close(state[MERGED], [[3.0]])


def test_one_slot_that_counts() -> None:
    """The same slot weighs as the four tokens in it (RazorAttention's paper): ln 4 is added to its logit."""
    rule = Rule(sinks=2, merge_into="one_slot", merge_weight="even", merge_bias="count", slots=3)
    _, v, state = merged(
        [[1.0]] * 6, [[0.0], [1.0], [2.0], [3.0], [4.0], [9.0]], [INF, INF, 1.0, 1.0, 1.0, INF], [0, 1, 5], rule
    )
    close(v, [[0.0], [2.5], [9.0]])
    close(state[BIAS][0, 0, :3], [0.0, 1.386294, 0.0])
    token = Token(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 7.0))
    for how in (decode_attend_reference, decode_attend_device):
        held = state.clone()
        out = how(token, held, Call.of_step(None, 6, Softmax(1.0), rule))
        close(out.flatten(), [(0.0 + 4 * 2.5 + 9.0 + 7.0) / 7])  # as if all six were there
        close(held[BIAS][0, 0, 1], 1.609438)  # the sixth token went into it
        close(held.v[0, 0, 1], [(4 * 2.5 + 9.0) / 5])


def test_sums_are_float32() -> None:
    """300 ones into a zero: 300 / 301, rounded once. A sum in bfloat16 would stand still at 256."""
    rule = Rule(sinks=1, merge_into="one_slot", merge_weight="even", slots=1)
    keys = [[1.0]] * 301
    _, v, _ = merged(keys, [[0.0], *[[1.0]] * 300], [INF, *[1.0] * 300], [0], rule, torch.bfloat16)
    assert v.dtype == torch.bfloat16
    close(v.float(), [[float(torch.tensor(300 / 301).bfloat16())]])


def test_cams_chance() -> None:
    """S7.3: attention .3 against .4 is merged with probability .75; nothing against nothing never, and always without
    attention behind."""
    place, rule = torch.arange(20_000), Rule(Scoring(seed=3))
    drawn = lucky(torch.tensor(0.3), torch.tensor(0.4), place, 0, rule)
    assert abs(float(drawn.float().mean()) - 0.75) < 0.01
    assert not lucky(torch.tensor(0.0), torch.tensor(0.0), place, 0, rule).any()
    assert lucky(torch.tensor(0.1), torch.tensor(0.0), place, 0, rule).all()
    other = lucky(torch.tensor(0.3), torch.tensor(0.4), place, 1, rule)
    assert 0.3 < float((drawn ^ other).float().mean()) < 0.45, "heads draw for themselves"


NEXT = Rule(merge_into="next", merge_weight="even", merge_mean="none", merge_count=2, slots=2)
STEPS = {
    "merging": (Rule(merge_into="nearest_key", slots=2), [[7.0], [1.75], [0.5]]),
    "d2o": (D2O.replace(slots=2, merge_halves="values"), [[7.0], [(1 + 0.8 * 3) / 2], [0.5]]),
    "next": (NEXT, [[7.0], [2.5], [2.0]]),
    "next, all there are": (NEXT.replace(merge_count=9), [[7.0], [2.5], [2.0]]),
    "position": (Rule(merge_into="nearest_position", merge_weight="even", slots=2), [[5.0], [1.0], [0.5]]),
}


@pytest.mark.parametrize("how", [decode_attend_reference, decode_attend_device], ids=["reference", "device"])
@pytest.mark.parametrize("name", list(STEPS))
def test_a_step(name: str, how: Any) -> None:
    """Slots of positions 3 and 9, then 10 comes; 5, which scores least, goes: the oldest but for a sink."""
    rule, want = STEPS[name]
    rule = rule.replace(sinks=1, slots=3)
    k = torch.tensor([[[[0.0, 5.0], [0.8, 0.6], [1.0, 0.0], [float("nan")] * 2]]])
    v = torch.tensor([[[[7.0], [3.0], [1.0], [float("nan")]]]])
    pos = torch.tensor([[[3, 5, 9, -1]]], dtype=torch.int32)
    state = State.empty(rule, k, B=1, H=1, C=4, D=2, V=1).replaced(k=k.clone(), v=v.clone(), pos=pos)
    state.cursor.copy_(torch.tensor([3, 3, 8, 3], dtype=torch.int32))
    token = Token(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, -4.0]]]]), torch.tensor([[[[0.5]]]]))
    out = how(token, state, Call.of_step(None, 10, Softmax(1.0), rule, tokens=_parted()))
    close(out.flatten(), [(7.0 + 3.0 + 1.0 + 0.5) / 4])  # attention still sees what goes
    assert state.pos.tolist() == [[[3, -1, 9, 10]]]
    held = state.v[0, 0, [0, 2, 3]]
    close(held, want)
    assert torch.equal(state.k[0, 0, [0, 2]], k[0, 0, [0, 2]])


def _parted() -> Tensor:
    """Where tokens stand: three of the 11 columns never held one."""
    return (torch.arange(11) >= 3)[None]


def test_nothing_is_asked_where_nothing_is_said() -> None:
    rule = Rule(slots=3)
    assert not rule[Merge].calls
    assert not rule[Merge].steps
    assert rule.encode() == Rule.parse(rule.encode()).encode()
    assert "merge" not in rule.encode()
