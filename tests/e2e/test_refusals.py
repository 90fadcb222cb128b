"""What kvpass will not rewrite it names, with a reason code, a node and a source line; nothing changes silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, tiny
from spelling import cache_of, with_cache
from transformers import DynamicCache

import kvpass

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


def generate(model: Any, ids: torch.Tensor, new: int = 6) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **GREEDY)


def test_training_is_refused() -> None:
    compiled = kvpass.compile(tiny.llama(), "h2o", 48, inner="eager")
    with pytest.raises(kvpass.KVPassError, match=r"(?i)grad|training") as caught:
        compiled(tiny.tokens(1, 60), **with_cache(compiled, DynamicCache()))
    assert "what to do: " in str(caught.value)


def test_strict_raises_with_reason_node_and_line() -> None:
    with pytest.raises(kvpass.KVPassError) as caught:
        run(kvpass.compile(plain.make(HalfDecoder), "h2o", 48, inner="eager"))
    text = str(caught.value)
    assert "UNSUPPORTED_ATTENTION" in text
    assert "scaled_dot_product_attention" in text
    assert "test_refusals.py:" in text
    assert any(reason.value in text for reason in kvpass.Reason)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_however_attention_is_written(attention: str) -> None:
    compiled = kvpass.compile(tiny.gpt2(attention), "h2o", 48, inner="eager")
    out = generate(compiled, tiny.tokens(1, 60))
    assert kvpass.inspect(cache_of(out)).layers[1].positions.shape == (1, 4, 48)


class HalfDecoder(plain.Decoder):
    """One block is SDPA, the other writes its attention out with a twist that no pattern can know."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].__class__ = OddBlock


class OddBlock(plain.TupleBlock):
    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        hidden = ~plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
        weights = torch.relu(q @ k.transpose(-1, -2)).masked_fill(hidden, 0)
        return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


def run(model: Any, steps: int = 6) -> tuple[torch.Tensor, Any]:
    ids, cache, logits = plain.tokens(1, 40), None, []
    for _ in range(steps):
        with torch.no_grad():
            out, cache = model(ids, cache)
        logits.append(out[:, -1])
        ids = out[:, -1].argmax(-1, keepdim=True)
    return torch.stack(logits), cache


def test_declined_site_is_reported() -> None:
    """Lenient: the good site gets slots, the odd one stays dense and says why, and at full budget nothing changes."""
    model = plain.make(HalfDecoder)
    logits, cache = run(kvpass.compile(model, "full", inner="eager", strict=False))
    expected, _ = run(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 SDPA in another order of summation
    data = kvpass.report(cache).to_dict()
    assert len(data["sites"]) == 1
    (declined,) = data["declined"]
    assert declined["reason"] in {reason.value for reason in kvpass.Reason}
    assert "plain.py" in declined["source"] or "test_refusals.py" in declined["source"]
    assert declined["node"]
    assert declined["hint"]
    assert torch.isfinite(cache[1][0]).all()


def test_declined_site_is_raised() -> None:
    with pytest.raises(kvpass.KVPassError, match="blocks"):
        run(kvpass.compile(plain.make(HalfDecoder), "full", inner="eager"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_cache_is_untouched(strict: bool) -> None:
    model = plain.make(plain.Uncached)
    compiled = kvpass.compile(model, "h2o", 48, inner="eager", strict=strict)
    ids = plain.tokens(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))
        linear = torch.nn.Linear(3, 3).eval()
        x = torch.ones(2, 3)
        assert torch.equal(kvpass.compile(linear, "h2o", 48, inner="eager", strict=strict)(x), linear(x))


def test_use_cache_false_is_untouched() -> None:
    model, ids = tiny.llama(), tiny.tokens(1, 90)
    compiled = kvpass.compile(model, "h2o", 48, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("policy", "budget"),
    [("h3o", 0.2), ("h2o", 0), ("h2o", -4), ("h2o", 1.5), ("h2o", 0.0), ("nowhere.yaml", 0.2), ({}, 0.2)],
)
def test_nonsense_is_refused_at_once(policy: Any, budget: Any) -> None:
    with pytest.raises(kvpass.KVPassError):
        kvpass.compile(tiny.llama(), policy, budget)


def test_explain_names_sites_and_reasons() -> None:
    ids = tiny.tokens(1, 60)
    good = str(kvpass.explain(tiny.llama(), input_ids=ids, use_cache=True, policy="h2o", budget=0.2))
    assert "h2o" in good
    assert "layers.1" in good or "layers[1]" in good
    odd = plain.make(HalfDecoder)
    _, cache = run(odd, steps=1)
    bad = str(kvpass.explain(odd, plain.tokens(1, 1), cache, policy="h2o", budget=0.2))
    assert "UNSUPPORTED_ATTENTION" in bad
