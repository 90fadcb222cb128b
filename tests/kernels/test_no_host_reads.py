"""A step on CUDA reads nothing back: under every built-in policy's rule, and whatever is seen.

Without a GPU: Triton's launches are recorded and not run, and a dispatch mode refuses the operators that a host must
wait for, on tensors of the CPU; on fake CUDA tensors torch itself refuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from kvpass.kernels import choose
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.codecs.storage import coded, fit_fields
from kvpass.kernels.decode_attend import decode_attend
from kvpass.kernels.decode_attend.call import Call, Token
from kvpass.kernels.decode_attend.device import decode_attend_device
from kvpass.kernels.decode_attend.reference import decode_attend_reference
from kvpass.kernels.exits.record import Merge
from kvpass.kernels.rank.scored import Scoring, arrivals
from kvpass.kernels.rank.weights import Weight
from kvpass.kernels.rule import Rule
from kvpass.kernels.slots.bias import biased
from kvpass.kernels.slots.state import State
from kvpass.kernels.slots.statistics import Statistics
from kvpass.kernels.testing import qkv
from models.states import arriving, builtin, state_under
from models.unread import HostRead, unread
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton", reason="triton is not installed")
from kvpass.kernels.decode_attend import triton as launcher
from kvpass.kernels.decode_attend.triton import decode_attend_triton, supports
from kvpass.kernels.triton_shared.triton_launch import Target, record

SEEN = 240
H100 = Target("cuda", 90, 132)


@cache
def _state(rule: Rule) -> State:
    return state_under(rule, SEEN)


def given(rule: Rule, kind: str, at: bool) -> tuple[Token, State, Call]:
    told: dict[str, Any] = {}
    state = _state(rule).clone()
    tokens = torch.ones(2, SEEN + 4, dtype=torch.bool)
    if kind == "tokens":
        told = {"sees": "causal window=100 chunk=64", "tokens": tokens}
    mask = torch.ones(2, 4, 1, SEEN + 1, dtype=torch.bool) if kind == "mask" else None
    if at:
        told["at"] = torch.tensor([SEEN], dtype=torch.int32)
    call = Call.of_step(mask, 0 if at else SEEN, Softmax(0.3), rule, **told)  # type: ignore[arg-type]
    return Token(*qkv(2, 4, 2, 1, 16, keys=1), arriving(rule, SEEN)), state, call


@pytest.mark.parametrize("name", list(builtin()))
def test_a_step(name: str) -> None:
    for kind, at in [("none", False), ("tokens", True), ("mask", False), ("mask", True)]:
        token, state, call = given(builtin()[name], kind, at)
        with unread():
            decode_attend_device(token, state, call)
            if supports(token, state, call):
                with record(H100) as launches:
                    decode_attend_triton(token, state, call)
                names = [launch.kernel.__name__ for launch in launches if launch.kernel.__name__ != "places_kernel"]
                assert names[:2] == ["split_kernel", "ending_kernel"]


MERGING = {name for name, rule in builtin().items() if rule[Merge].steps}
CODED = {name for name, rule in builtin().items() if coded(rule)}
FITTED = {name for name, rule in builtin().items() if fit_fields(rule)}
BIASED = {name for name, rule in builtin().items() if biased(rule)}
DEMOTING = {name for name, rule in builtin().items() if rule.demotes}


def test_triton_takes_all_but_rings_merges_biases_fits_and_tiers() -> None:
    given_up = {name for name, rule in builtin().items() if not supports(*given(rule, "none", False))}
    assert given_up == {"cascading"} | MERGING | BIASED | DEMOTING | FITTED
    assert "am_fast" in BIASED
    assert {"merging", "cam", "d2o", "razor_attention"} <= MERGING
    assert {"turbo", "snapkv_int4", "h2o_int8"} <= CODED - FITTED - DEMOTING
    assert "mikv" in DEMOTING
    assert {"kivi", "think", "vidkv", "csr"} <= FITTED


def test_what_cuda_runs_instead() -> None:
    for name, runs in [("cascading", decode_attend_device), ("h2o", decode_attend_triton)]:
        assert choose.kernel("decode_attend", torch.device("cuda"), *given(builtin()[name], "none", False)) is runs


def faked(name: str, device: str, run: Callable[..., Tensor]) -> Tensor:
    """A step on fake tensors, which have no contents to read."""
    (q, k, v, arrive), state, _ = given(builtin()[name], "none", False)
    tokens, at = torch.ones(2, SEEN + 4, dtype=torch.bool), torch.tensor([SEEN], dtype=torch.int32)
    with FakeTensorMode(allow_non_fake_inputs=True), record(H100):

        def there(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        q, k, v, arrive, state, tokens, at = tree_map_only(
            Tensor, there, (q, k, v, arrive, state.tensors(), tokens, at)
        )
        told = {"arrive": arrive, "sees": "causal window=100", "tokens": tokens, "at": at}
        return run(q, k, v, None, state, 0, 0.3, builtin()[name].encode(), **told)


@pytest.mark.parametrize("name", [name for name in builtin() if name not in {"cascading", *MERGING, *CODED, *BIASED}])
def test_the_op_on_fake_cuda_tensors(name: str) -> None:
    """The op as it is called, with the implementation that CUDA gets. (Torch without CUDA cannot index fake tensors of
    CUDA, which Triton's path does not.)
    """
    out = faked(name, "cuda", decode_attend)
    assert out.device.type == "cuda"
    assert out.shape == (2, 4, 1, 16)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(
            (name, decode_attend_device)
            for name in ("cascading", "h2o", "ada_snapkv", *sorted(MERGING | CODED | BIASED))
        ),
        *((name, decode_attend_triton) for name in sorted(CODED - DEMOTING - FITTED)),
    ],
)
def test_torch_on_fake_tensors(name: str, step: Callable[..., Tensor]) -> None:
    """What torch does of a step; Triton's launches are recorded."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, mask: None, state: list[Tensor], position: int, scale: float, rule: str,
        *, arrive: Tensor | None, **told: Any,
    ) -> Tensor:  # fmt: skip
        plan = Rule.parse(rule)
        call = Call.of_step(mask, position, Softmax(scale), plan, **told)
        return step(Token(q, k, v, arrive), State.of(state, plan), call)

    assert faked(name, "cpu", run).shape == (2, 4, 1, 16)


@pytest.mark.parametrize("name", [name for name, rule in builtin().items() if rule[Statistics].arrives])
def test_what_a_token_brings(name: str) -> None:
    rule, (_, k, v) = builtin()[name], qkv(2, 4, 2, 1, 16, keys=1)
    state = state_under(rule, SEEN)
    beside: dict[str, Tensor] = {}
    if rule[Weight].projected:
        beside["wo"] = torch.randn(32, 64)
    if "hidden" in rule[Scoring].reads:
        beside["hidden"] = torch.randn(2, 1, 32)
    arrivals(k, v, state.cursor, SEEN, rule.encode(), **beside)  # files are read once
    with unread():
        arrivals(k, v, state.cursor, SEEN, rule.encode(), **beside)


def planted(name: str, fault: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device path with something in it that reads."""
    from kvpass.kernels.decode_attend import device

    whole = device.evict

    def read(state: State, *args: Any) -> None:
        fault(state.cursor)
        whole(state, *args)

    monkeypatch.setattr(device, "evict", read)


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda cursor: cursor[0, 0, 0].item(),
    "int": lambda cursor: int(cursor.max()),
    "tolist": lambda cursor: cursor.tolist(),
    "branch": lambda cursor: 1 if (cursor > 0).all() else 0,
    "nonzero": lambda cursor: cursor.nonzero(),
    "boolean index": lambda cursor: cursor[cursor > 0],
    "boolean put": lambda cursor: cursor.clone().index_put_((cursor > 0,), cursor.new_ones(())),
    "equal": lambda cursor: torch.equal(cursor, cursor),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_check_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(fault, FAULTS[fault], monkeypatch)
    with pytest.raises(HostRead), unread():
        decode_attend_device(*given(builtin()["h2o"], "none", False))


def test_a_launcher_that_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = launcher._prepared

    def read(token: Token, state: State, call: Call) -> Any:
        assert int(state.cursor[0, 0, 0]) < state.slots
        return whole(token, state, call)

    monkeypatch.setattr(launcher, "_prepared", read)
    with pytest.raises(HostRead), unread(), record(H100):
        decode_attend_triton(*given(builtin()["h2o"], "none", False))


def test_the_reference_reads() -> None:
    with pytest.raises(HostRead), unread():
        decode_attend_reference(*given(builtin()["h2o"], "none", False))


def test_fake_tensors_refuse_the_reference() -> None:
    token, state, _ = given(builtin()["h2o"], "none", False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty_like(x, device="cuda") for x in token[:3])
        tensors = [torch.empty_like(x, device="cuda") for x in state.tensors()]
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)), choose.use("reference"):
            decode_attend(q, k, v, None, tensors, SEEN, 0.3, builtin()["h2o"].encode())
