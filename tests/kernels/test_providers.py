"""Who computes attention on a device: what each provider supports, the choice by the table, the path on a fake GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kvpass.kernels.attention.softmax import Softmax
from kvpass.kernels.attention.visibility import Sees, Shown
from kvpass.kernels.prefill_attend.providers import choose, cpu_flash, cudnn, flash, measure
from kvpass.kernels.prefill_attend.providers.call import Call, Facts, facts_of
from kvpass.kernels.prefill_attend.reference import prefill_attend_reference
from kvpass.kernels.rule import Rule
from kvpass.kernels.testing import assert_close, qkv
from kvpass.kernels.triton_shared.triton_launch import Target, record
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

H2O = Rule(stats=("sum",), queries=-1, decode="add", score="sum", num=1, den=5)
HOPPER = Target("cuda", 90, 132)
PROMPT = Facts("cuda", 90, torch.bfloat16, 1, 32, 8, 8192, 8192, 128, 128, Sees(causal=True), False, False, True, False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All providers are there, none has refused anything."""
    for module in (cudnn, flash):
        monkeypatch.setattr(module, "enabled", lambda: True)
    monkeypatch.setattr(choose, "_refused", set())
    monkeypatch.setattr(choose, "_decided", {})
    choose.fitting.cache_clear()
    yield
    choose.fitting.cache_clear()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "cudnn"),
        ({"arch": 100}, "cudnn"),
        ({"tokens": True}, "cudnn"),
        ({"sees": Sees()}, "cudnn"),
        ({"sees": Sees(causal=True, mean=True)}, "cudnn"),
        ({"dim": 256, "value_dim": 256}, "flash"),
        ({"queries": 32768, "keys": 32768, "dim": 256, "value_dim": 256}, "flash"),
        ({"dim": 192, "value_dim": 128}, "triton"),
        ({"dim": 60, "value_dim": 60}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"sees": Sees(causal=True, window=4096)}, "triton"),
        ({"sees": Sees(causal=True, chunk=4096)}, "triton"),
        ({"mask": True}, "triton"),
        ({"softcap": True}, "triton"),
        ({"square": False}, "triton"),
        ({"queries": 1, "keys": 1}, "triton"),
        ({"arch": 80}, "flash"),
        ({"arch": 75}, "triton"),
        ({"kind": "hip", "arch": 0}, "triton"),
        ({"kind": "interpret", "arch": 0}, "triton"),
    ],
)
def test_choice(change: dict[str, object], name: str) -> None:
    facts = PROMPT._replace(**change)
    expected = name
    if name == "flash" and facts.arch == 90:  # at 8,192 our kernel is ahead of it, in the table
        expected = "triton" if facts.queries == 8192 else "flash"
    assert choose.provider_for(facts) == expected


def test_choice_follows_the_table() -> None:
    def row(queries: int, dtype: str = "bfloat16", arch: int = 90, **ms: float) -> dict[str, object]:
        return {"arch": arch, "dtype": dtype, "dim": 128, "queries": queries, "ms": ms}

    rows = (row(1024, triton=1.0, cudnn=2.0), row(65536, triton=2.0, cudnn=1.0), row(8192, "float16", flash=1.0))
    assert choose.order(PROMPT._replace(queries=2000), rows) == ("triton", "cudnn")
    assert choose.order(PROMPT._replace(queries=30000), rows) == ("cudnn", "triton")
    assert choose.order(PROMPT._replace(dtype=torch.float16, queries=30), rows) == ("flash",)
    assert choose.order(PROMPT._replace(arch=120), rows) == choose.UNMEASURED
    assert choose.order(PROMPT._replace(arch=100), rows)[0] == "triton"


def test_forced() -> None:
    with choose.use_provider("flash"):
        assert choose.provider_for(PROMPT) == "flash"
        with pytest.raises(ValueError, match="flash was asked for, but does not support"):
            choose.provider_for(PROMPT._replace(softcap=True))
    with pytest.raises(ValueError, match="unknown provider 'cuda'"), choose.use_provider("cuda"):
        pass
    assert choose.provider_for(PROMPT) == "cudnn"


def fake_call(tokens: bool = False, dtype: torch.dtype = torch.bfloat16, sinks: bool = False) -> Call:
    """Of a fake mode's GPU."""
    q, k, v = (torch.empty(2, 300, heads, 64, dtype=dtype, device="cuda").transpose(1, 2) for heads in (8, 2, 2))
    real = torch.empty(2, 300, dtype=torch.bool, device="cuda") if tokens else None
    bounds = None if real is None else torch.empty(2, 4, dtype=torch.int32, device="cuda")
    shown = Shown(Sees(causal=True), 300, 0, real, bounds)
    return Call(q, k, v, None, shown, Softmax(0.125, torch.empty(8, device="cuda") if sinks else None))


@pytest.mark.parametrize("name", ["cudnn", "flash", "triton"])
@pytest.mark.parametrize("tokens", [False, True])
def test_fake_gpu(name: str, tokens: bool) -> None:
    """The whole implementation on fake CUDA tensors: shapes, launches, no look at what a tensor holds."""
    from kvpass.kernels.prefill_attend.triton import prefill_attend_triton

    with FakeTensorMode(), record(HOPPER) as launches, choose.use_provider(name):
        call = fake_call(tokens, sinks=tokens)
        out, stats, valid = prefill_attend_triton(*call[:6], H2O)
    assert out.shape == call.q.shape
    assert out.device.type == "cuda"
    assert out.transpose(1, 2).is_contiguous(), "the op would copy it"
    assert (stats.shape, stats.dtype, valid.shape) == ((1, 2, 2, 300), torch.float32, (2, 300))
    listed = [(launch.kernel.__name__, launch.arguments.get("MEND")) for launch in launches]
    attend = [] if name != "triton" and not tokens else [("attend_kernel", name != "triton")]
    assert listed == [*attend, ("statistics_kernel", None)]
    [(text, chosen)] = choose.decisions().items()
    assert chosen == name
    assert "8/2 heads of 64, up to 512 queries" in text


def test_a_look_at_the_values_would_be_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        fake_call(tokens=True).shown.bounds.tolist()  # type: ignore[union-attr]


def results(call: Call) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of a causal call in float64."""
    q, k, v = (x.double() for x in call[:3])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    logits = (q @ k.mT * call.softmax.scale).masked_fill(hidden, float("-inf"))
    return (logits.softmax(-1) @ v).to(call.q.dtype), logits.logsumexp(-1).float()


def call_of(sinks: Tensor | None = None, queries: int = 70) -> Call:
    q, k, v = qkv(2, 4, 2, queries, 16)
    return Call(q, k, v, None, Shown(Sees(causal=True), queries), Softmax(0.3, sinks))


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_vendor_by_a_stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's op is given, and what is made of what it returns: a natural log-sum-exp, for cuDNN one column."""
    seen: list[tuple[object, ...]] = []

    def op(q: Tensor, k: Tensor, v: Tensor, *rest: object, scale: float) -> tuple[Tensor, ...]:
        seen.append((*rest, scale))
        out, lse = results(Call(q, k, v, None, Shown(Sees(causal=True), q.shape[2]), Softmax(scale)))
        return out, lse[..., None] if name == "cudnn" else lse, *[torch.empty(0)] * 7

    module = {"cudnn": cudnn, "flash": flash}[name]
    aten = SimpleNamespace(**{f"_scaled_dot_product_{name}_attention": op})
    with monkeypatch.context() as patch:
        patch.setattr(module, "torch", SimpleNamespace(ops=SimpleNamespace(aten=aten)))
        call = call_of()
        out, lse = module.attend(call)
    want, expected = cpu_flash.attend(call)
    assert_close(out, want, what="out")
    assert_close(lse, expected, what="lse")
    assert seen == [(None, True, 0.0, True, False, 0.3) if name == "cudnn" else (0.0, True, False, 0.3)]


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.7, -1.5, 4.0, 9.0])])
def test_cpu_flash_is_the_reference(sinks: Tensor | None) -> None:
    call = call_of(sinks)
    with choose.use_provider("cpu_flash"):
        out, lse = choose.attend(call)
    want, _, _ = prefill_attend_reference(*call[:6], Rule())
    assert_close(out, want, what="out")
    expected = results(call)[1]
    if sinks is not None:
        expected = torch.logaddexp(expected, sinks[:, None])
    assert_close(lse, expected, what="lse")


def test_a_provider_that_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The next is taken and the log says so; a forced one, and a lack of memory, are the caller's."""

    def refuse(call: Call) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no valid execution plans")

    monkeypatch.setattr(cudnn, "attend", refuse)
    with FakeTensorMode(), record(HOPPER):
        call = fake_call()
        with choose.use_provider("cudnn"), pytest.raises(RuntimeError, match="execution plans"):
            choose.attend(call)
        with caplog.at_level(logging.WARNING):
            out, lse = choose.attend(call)
        assert (out.shape, lse.shape, lse.dtype) == (call.q.shape, call.q.shape[:3], torch.float32)
        assert "cudnn refuses cuda 90 bfloat16" in caplog.text
        assert choose.provider_for(facts_of(call, "cuda", 90)) != "cudnn"
        monkeypatch.setattr(choose, "_refused", set())
        monkeypatch.setattr(cudnn, "attend", lambda call: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            choose.attend(call)


def test_measure_writes_a_table(tmp_path: Path) -> None:
    to = tmp_path / "table.json"
    measure.main(
        [
            "--queries",
            "32,64",
            "--dims",
            "16",
            "--dtypes",
            "float32",
            "--heads",
            "4",
            "--kv-heads",
            "2",
            "--to",
            str(to),
        ]
    )
    rows = json.loads(to.read_text())["rows"]
    assert [(row["queries"], row["dim"], row["dtype"], row["arch"]) for row in rows] == [
        (32, 16, "float32", 0), (64, 16, "float32", 0),
    ]  # fmt: skip
    assert all(set(row["ms"]) == {"cpu_flash"} and row["ms"]["cpu_flash"] > 0 for row in rows)
    measure.main(
        ["--queries", "64", "--dims", "16", "--dtypes", "float32", "--heads", "4", "--kv-heads", "2", "--to", str(to)]
    )
    again = json.loads(to.read_text())["rows"]
    assert len(again) == 2, "a row that is measured again takes the old one's place"


def test_the_table_is_read() -> None:
    rows = choose.table()
    assert rows
    assert all(set(row["ms"]) <= set(choose.NAMES) for row in rows)
