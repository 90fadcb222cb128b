"""`kvpass.explain` traces a prompt and the step after it, however many models of the class were compiled before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, tiny
from models.styles import gpt_fast
from models.styles.style import make
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import kvpass
from kvpass.errors import KVPassError


def phases(explanation: Any) -> list[tuple[str, list[str]]]:
    """Of each graph: the call that it belongs to, and the phases of its sites."""
    pairs = zip(explanation.calls, explanation.tables, strict=True)
    return [(call, [site.phase.value for site in table]) for call, table in pairs]


def test_a_causal_lm_of_transformers() -> None:
    ids, mask = tiny.left_padded([40, 30])
    found = kvpass.explain(tiny.llama(), input_ids=ids, attention_mask=mask, policy="h2o", budget=8)
    assert phases(found) == [("prefill", ["prefill"] * 2), ("step", ["decode"] * 2)]
    assert len(found.plans) == 2
    text = str(found)
    assert text.index("prefill:\n") < text.index("graph 1") < text.index("step:\n") < text.index("graph 2")
    assert found.to_dict()["calls"] == ["prefill", "step"]
    assert found.no_step == ""


def test_positional_arguments() -> None:
    assert kvpass.explain(tiny.llama(), tiny.tokens(1, 20)).calls == ("prefill", "step")


def test_an_encoder_and_a_decoder() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes, decoder_start_token_id=0)).eval()
    source = tiny.tokens(1, 20)
    mask = torch.ones_like(source)
    found = kvpass.explain(model, input_ids=source, attention_mask=mask, decoder_input_ids=tiny.tokens(1, 9))
    assert found.no_step == ""
    step = [table for call, table in zip(found.calls, found.tables, strict=True) if call == "step"]
    assert [site.phase.value for table in step for site in table] == ["decode"]


class Growing(plain.Decoder):
    """What it returns is matched in the prompt, but a step joins it to the new keys in a way that nobody knows."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.blocks[0].__class__ = GrowingBlock


class GrowingBlock(plain.TupleBlock):
    def forward(self, x: Tensor, cache: Any) -> Any:
        q, k, v = self.project(x, 0 if cache is None else cache[0].shape[2])
        if cache is not None:
            k, v = (torch.cat([old.roll(1, 2), new], 2) for old, new in zip(cache, (k, v), strict=True))
        return self.finish(x, self.core(q, k, v)), (k, v)


def test_what_a_step_declines_is_seen() -> None:
    """The cache of a tuple decoder is found by its place in the output."""
    found = kvpass.explain(plain.make(Growing), plain.tokens(1, 20))
    assert phases(found)[0] == ("prefill", ["prefill"])
    assert not found.tables[0].declined
    assert [call for call, table in zip(found.calls, found.tables, strict=True) if table.failed] == ["step"]
    assert "PAST_NOT_INPUT" in str(found).split("step:")[1]


@pytest.mark.parametrize(
    "step",
    [
        lambda model: {"idx": plain.tokens(1, 1), "input_pos": torch.tensor([20])},
        lambda model: (plain.tokens(1, 1), torch.tensor([20])),
        lambda model: lambda out: {"idx": out[:, -1:].argmax(-1), "input_pos": torch.tensor([20])},
    ],
    ids=["keywords", "positional", "function"],
)
def test_a_step_that_the_caller_gives(step: Any) -> None:
    model = make(gpt_fast.Transformer)
    model.init_cache(1, 40)
    found = kvpass.explain(model, plain.tokens(1, 20), torch.arange(20), step=step(model))
    assert [call for call, _ in phases(found)] == ["prefill", "step"]
    assert phases(found)[1][1] == ["decode", "decode"]


def test_no_step_is_said() -> None:
    model = make(gpt_fast.Transformer)
    model.init_cache(1, 40)
    found = kvpass.explain(model, plain.tokens(1, 20), torch.arange(20))
    assert set(found.calls) == {"prefill"}
    assert "step: not traced" in str(found)
    assert "step=lambda out" in found.no_step == found.to_dict()["no_step"]


def test_a_step_of_the_callers_that_fails_is_raised() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        kvpass.explain(plain.make(plain.Decoder), plain.tokens(1, 20), step={"nonsense": 1})


def test_a_first_call_that_is_a_step() -> None:
    model = plain.make(plain.Decoder)
    with torch.no_grad():
        _, cache = model(plain.tokens(1, 20))
    found = kvpass.explain(model, plain.tokens(1, 1), cache)
    assert phases(found) == [("call", ["decode", "decode"])]
    assert "step: not traced" in str(found)


def test_past_the_limit_of_other_models() -> None:
    """Graphs of other models of the class do not count: the second explanation says what the first one did."""
    model = plain.make(plain.Decoder)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = kvpass.compile(model, "h2o", 20, inner="eager")
        with torch.no_grad():
            compiled(plain.tokens(1, 30), compiled(plain.tokens(1, 30))[1])
        said = {str(kvpass.explain(model, plain.tokens(1, 20))) for _ in range(2)}
        assert torch._dynamo.config.recompile_limit == 1
    assert len(said) == 1
    assert next(iter(said)).count("2 site(s) matched") == 2


class Hidden(plain.Decoder):
    @torch._dynamo.disable
    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        return super().forward(ids, cache)


def test_never_empty() -> None:
    with pytest.raises(KVPassError, match=r"traced no graph.*skipped") as caught:
        kvpass.explain(plain.make(Hidden), plain.tokens(1, 20))
    assert "module inside" in caught.value.hint
    with torch._dynamo.config.patch(disable=True), pytest.raises(KVPassError, match="disabled"):
        kvpass.explain(plain.make(plain.Decoder), plain.tokens(1, 20))
