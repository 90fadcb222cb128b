"""`kvpass.rewrite` and `kvpass.export_mlir`: what they take and refuse, what the results look like."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from models import exported, plain
from models.exported import Step, export
from torch.export import Dim

import kvpass
from kvpass.errors import CacheError, DeclinedError, PolicyError
from kvpass.lowering.exported import any_size
from kvpass.lowering.pure import decompositions
from kvpass.runtime import step as seam
from kvpass.runtime import steps

pytestmark = pytest.mark.usefixtures("in_torch")

STATE = [f"kvpass_{layer}_{name}" for layer in (0, 1) for name in ("k", "v", "pos", "stats", "cursor")]


@pytest.fixture(scope="module")
def step() -> Any:
    return exported.program("plain")[1]


class Widened(Step):
    """Also returns the cached keys doubled."""

    def forward(self, ids: Any, k0: Any, v0: Any, k1: Any, v1: Any) -> tuple[Any, ...]:
        outputs = super().forward(ids, k0, v0, k1, v1)
        return (*outputs, outputs[1] * 2)


def test_inputs_and_outputs(step: Any) -> None:
    before = str(step.graph)
    rewritten = kvpass.rewrite(step, "h2o", 8)
    assert list(rewritten.inputs) == ["ids", "tokens", *STATE]
    assert rewritten.outputs[1:] == tuple(STATE)
    assert [site.name for site in rewritten.table] == ["model.blocks.0", "model.blocks.1"]
    assert str(rewritten.plan) in str(rewritten)
    assert "kvpass_1_cursor" in str(rewritten)
    assert str(step.graph) == before


class Sweep(seam.Step):
    """Made up: does nothing, around each call."""

    name, about = "sweep", "does nothing"

    def __init__(self, moment: seam.Moment) -> None:
        self.moment, self.calls = moment, 0

    def applies(self, rule: Any, phase: Any) -> bool:
        return True

    def run(self, call: Any) -> None:
        self.calls += 1


def test_what_goes_must_be_dropped(step: Any) -> None:
    with pytest.raises(PolicyError, match="what goes is dropped"):
        kvpass.rewrite(step, {"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}}, 8)


def test_steps_around_a_call(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program stands alone: it can check its calls, but nothing happens between them."""
    check = Sweep(seam.Moment.CHECK)
    monkeypatch.setattr(steps, "STEPS", (*steps.STEPS, check))
    rewritten = kvpass.rewrite(step, "h2o", 8)
    rewritten.step(plain.tokens(2, 1), tokens=0, state=rewritten.empty_state())
    assert check.calls == 1
    with kvpass.marked(keep=torch.ones(2, 1).bool()), pytest.raises(CacheError, match="reads no marks"):
        rewritten.step(plain.tokens(2, 1), tokens=0, state=rewritten.empty_state())
    for moment in (seam.Moment.BEFORE, seam.Moment.AFTER):
        monkeypatch.setattr(steps, "STEPS", (Sweep(moment),))
        with pytest.raises(PolicyError, match="cannot express"):
            kvpass.rewrite(step, "h2o", 8)


def test_a_graph_module_is_as_good(step: Any) -> None:
    ours = kvpass.rewrite(step.module(), "h2o", 8)
    assert ours.inputs == kvpass.rewrite(step, "h2o", 8).inputs


def test_first_state_and_step(step: Any) -> None:
    rewritten = kvpass.rewrite(step, "roco", 16)
    state = rewritten.empty_state(100)
    assert [tuple(t.shape) for t in state[:5]] == [(2, 2, 17, 8), (2, 2, 17, 8), (2, 2, 17), (3, 2, 2, 17), (2, 2, 4)]
    kept = [t.clone() for t in state]
    (logits,), after = rewritten.step(plain.tokens(2, 1), tokens=0, state=state)
    assert logits.shape == (2, 1, plain.VOCABULARY)
    assert after[2][0, 0].tolist() == [0] + [-1] * 16
    for now, then in zip(state[2:5], kept[2:5], strict=True):
        assert torch.equal(now, then)


def test_slots_with_biases(step: Any) -> None:
    """What a prompt's fit left is read: `decode_step_6`, and the same in plain torch; with 0 nothing differs."""
    ids = plain.tokens(2, 6)
    plain_ones = kvpass.rewrite(step, "h2o", 8)
    rewritten = kvpass.rewrite(step, {"name": "mine", "extends": "h2o", "evicted": "refit"}, 8)
    names = [f"kvpass_{at}_{name}" for at in (0, 1) for name in ("k", "v", "pos", "stats", "cursor", "bias")]
    assert list(rewritten.inputs) == ["ids", "tokens", *names]
    assert "decode_step_6" in str(rewritten.graph_module.graph)
    state, other = rewritten.empty_state(40), plain_ones.empty_state(40)
    for at in range(5):
        (logits,), state = rewritten.step(ids[:, at : at + 1], tokens=at, state=state)
        (wanted,), other = plain_ones.step(ids[:, at : at + 1], tokens=at, state=other)
        assert torch.equal(logits, wanted)
    state = [2 * torch.rand_like(t) if name.endswith("bias") else t for name, t in zip(names, state, strict=True)]
    (logits,), after = rewritten.step(ids[:, 5:6], tokens=5, state=state)
    (wanted,), _ = plain_ones.step(ids[:, 5:6], tokens=5, state=other)
    assert not torch.allclose(logits, wanted, atol=1e-4)
    with any_size():
        program = rewritten.program.run_decompositions(decompositions())
    assert "kvpass" not in str({node.target for node in program.graph.nodes if node.op == "call_function"})
    again = program.module()(ids[:, 5:6], 5, *state)
    torch.testing.assert_close(again[0], logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(again[3], after[2])


def test_a_dynamic_batch_must_be_named() -> None:
    program = export(Step(plain.make(plain.Decoder)), 8, rows=Dim.DYNAMIC)
    rewritten = kvpass.rewrite(program, "h2o", 8)
    with pytest.raises(ValueError, match="batch="):
        rewritten.empty_state()
    for batch in (1, 3):
        state = rewritten.empty_state(batch=batch)
        (logits,), _ = rewritten.step(plain.tokens(batch, 1), tokens=0, state=state)
        assert logits.shape[0] == batch
    assert rewritten.program.module()(plain.tokens(3, 1), 0, *rewritten.empty_state(9, batch=3))[0].shape[0] == 3


@pytest.mark.parametrize("decompositions", [{}, None], ids=["inference", "core aten"])
def test_decomposed_programs(step: Any, decompositions: Any) -> None:
    """torch.export's other forms: SDPA is then a matmul, a softmax and a matmul."""
    rewritten = kvpass.rewrite(step.run_decompositions(decompositions), "h2o", 8)
    direct = kvpass.rewrite(step, "h2o", 8)
    state = direct.empty_state(20)
    for t in range(20):
        ids = plain.tokens(2, 1, seed=t)
        (ours,), after = rewritten.step(ids, tokens=t, state=state)
        (want,), state = direct.step(ids, tokens=t, state=state)
        torch.testing.assert_close(ours, want)
        assert torch.equal(after[2], state[2])


def coded(held: dict[str, Any]) -> dict[str, Any]:
    return {"name": "mine", "extends": "h2o", "store": {"k": "int8", "v": "int4", "rotate": "hadamard", **held}}


def test_coded_slots(step: Any) -> None:
    """Where each token has a whole copy, codes change nothing; else they change little, the same in both forms."""
    whole, few, dense = (
        kvpass.rewrite(step, policy, 8)
        for policy in (coded({"residual": 40, "sinks": 0}), coded({"residual": 2, "sinks": 1}), "h2o")
    )
    assert [name for name in few.inputs if name.startswith("kvpass_0")][5:] == [
        f"kvpass_0_{name}" for name in ("whole_at", "k_codes", "k_scale", "k_low", "v_codes", "v_scale", "v_low")
    ]
    with any_size():
        inline = few.program.run_decompositions(decompositions())
    assert not [n for n in inline.graph.nodes if "kvpass" in str(n.target) and n.op == "call_function"]
    states = [one.empty_state(14) for one in (whole, few, dense)]
    changed = 0.0
    for t in range(14):
        ids = plain.tokens(2, 1, seed=t)
        said = inline.module()(ids, t, *states[1])
        logits = []
        for at, one in enumerate((whole, few, dense)):
            (out,), states[at] = one.step(ids, tokens=t, state=states[at])
            logits.append(out)
        torch.testing.assert_close(logits[0], logits[2])
        torch.testing.assert_close(said[0], logits[1])
        changed = max(changed, float((logits[1] - logits[2]).abs().max()))
    assert 1e-4 < changed < 0.5


class Flash(plain.TupleBlock):
    """What SDPA is on a CPU below autograd."""

    def core(self, q: Any, k: Any, v: Any) -> Any:
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3)[0]


class FlashDecoder(plain.Decoder):
    block = Flash


def test_the_cores_that_sdpa_becomes() -> None:
    program = export(Step(plain.make(FlashDecoder)), 8)
    rewritten = kvpass.rewrite(program, "h2o", 8)
    assert {(site.core.pattern, site.core.scale) for site in rewritten.table} == {("sdpa_aten", 0.3)}
    (logits,), _ = rewritten.step(plain.tokens(2, 1), tokens=0, state=rewritten.empty_state())
    assert logits.isfinite().all()


def test_nothing_of_the_logical_length_is_a_float(step: Any) -> None:
    """Masks and positions may be as long as the text, keys and values may not."""
    for name in ("plain", "llama"):
        rewritten = kvpass.rewrite(exported.program(name)[1], "h2o", 8)
        with any_size():
            program = rewritten.program.run_decompositions(decompositions())
        tokens = next(n.meta["val"] for n in program.graph.nodes if n.name == "tokens").node.expr
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                sizes = [s.node.expr for s in value.shape if isinstance(s, torch.SymInt)]
                assert not any(tokens in size.free_symbols for size in sizes), node


def test_bad_policies(step: Any) -> None:
    with pytest.raises(PolicyError, match="did you mean 'h2o'"):
        kvpass.rewrite(step, "h20", 8)
    with pytest.raises(PolicyError, match="no budget"):
        kvpass.rewrite(step, "h2o")


def test_a_declined_site_is_named() -> None:
    program = export(Widened(plain.make(plain.Decoder)), 8)
    with pytest.raises(DeclinedError, match=r"model.blocks.0: KEY_ESCAPES at mul"):
        kvpass.rewrite(program, "h2o", 8)
    rewritten = kvpass.rewrite(program, "h2o", 8, strict=False)
    assert [site.name for site in rewritten.table] == ["model.blocks.1"]
    assert rewritten.inputs[:4] == ("ids", "k0", "v0", "tokens")


def test_nothing_to_rewrite() -> None:
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    with pytest.raises(DeclinedError, match="no attention with a KV cache"):
        kvpass.rewrite(program, "h2o", 8)


def test_a_prefill_is_no_step() -> None:
    program = torch.export.export(plain.make(plain.Decoder), (plain.tokens(2, 6),))
    with pytest.raises(DeclinedError, match="prefill program"):
        kvpass.rewrite(program, "h2o", 8)


def test_a_fixed_past_is_refused() -> None:
    program = export(Step(plain.make(plain.Decoder)), 8, past=None)
    with pytest.raises(DeclinedError, match="fixed length of 5"):
        kvpass.rewrite(program, "h2o", 8)


@pytest.mark.parametrize("ops", ["inline", "custom"])
def test_mlir_of_coded_slots(step: Any, ops: str, tmp_path: Any) -> None:
    pytest.importorskip("torch_mlir.ir")
    text = kvpass.export_mlir(kvpass.rewrite(step, coded({"residual": 2}), 8), tmp_path / "step.mlir", ops=ops)
    assert ("torch.kvpass.decode_step_12" in text) == (ops == "custom")
    assert "ui8" in text


@pytest.mark.parametrize("ops", ["inline", "custom"])
@pytest.mark.parametrize("dialect", ["torch", "linalg"])
def test_mlir_text(step: Any, dialect: str, ops: str, tmp_path: Any) -> None:
    ir = pytest.importorskip("torch_mlir.ir")
    from torch_mlir.dialects import torch as torch_dialect

    path = tmp_path / "step.mlir"
    text = kvpass.export_mlir(kvpass.rewrite(step, "h2o", 8), path, dialect=dialect, ops=ops)
    assert path.read_text() == text
    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        assert ir.Module.parse(text).operation.verify()
    assert ("linalg.generic" in text) == (dialect == "linalg")
    assert ("!torch" in text) == (dialect == "torch")
    named = {"torch": 'torch.operator "torch.kvpass.decode_step"', "linalg": "call @kvpass.decode_step_1("}[dialect]
    assert (named in text) == (ops == "custom")
    assert ("kvpass" in text) == (ops == "custom")
    assert ops == "inline" or "recent_num=1 recent_den=2 slots=8" in text


def test_mlir_needs_torch_mlir(step: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)
    with pytest.raises(kvpass.KVPassError, match="pip install --no-deps torch-mlir"):
        kvpass.export_mlir(kvpass.rewrite(step, "h2o", 8), tmp_path / "step.mlir")


def test_mlir_arguments_are_checked(step: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="'tosa'"):
        kvpass.export_mlir(kvpass.rewrite(step, "h2o", 8), tmp_path / "step.mlir", dialect="tosa")
