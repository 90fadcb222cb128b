"""One family for each way of spelling attention, through the same checks as `make support` (tests/support)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

import case
import scoreboard
from families import build
from feed import Feed, prompt
from masks import said
from oracle.anyhf import AnyOracle
from oracle.hf import Oracle

from kvpass.lowering.retire import Retirement

FAMILIES = [
    pytest.param("llama", "sdpa", marks=pytest.mark.wide),  # what most tests of this folder run
    pytest.param("llama", "eager", marks=pytest.mark.wide),
    ("bloom", "eager"),  # ALiBi by baddbmm, heads and sequences in one axis
    pytest.param("mpt", "eager", marks=pytest.mark.wide),  # ALiBi added to the logits
    pytest.param("falcon", "eager", marks=pytest.mark.wide),  # one KV head
    pytest.param("gptj", "eager", marks=pytest.mark.wide),
    pytest.param("gpt_neox", "eager", marks=pytest.mark.wide),
    pytest.param("gemma2", "eager", marks=pytest.mark.wide),  # softcap (a style has it), sliding layers
    ("granite_swa", "eager"),  # sinks by logsumexp, after the attention
    pytest.param("deepseek_v3", "sdpa", marks=pytest.mark.wide),  # latent attention: values narrower than keys
    ("deepseek_v32", "sdpa"),  # latent attention too, and a mask by an indexer, as wide as the expanded keys
    ("qwen3_next", "sdpa"),  # linear attention beside
    pytest.param("bamba", "sdpa", marks=pytest.mark.wide),  # state-space layers beside
    pytest.param("diffllama", "eager", marks=pytest.mark.wide),  # two attentions read one cache
    pytest.param("phi3", "eager", marks=pytest.mark.wide),
]


def check(family: str, attention: str, *skip: str) -> None:
    result = case.run(family, attention, skip=skip)
    assert scoreboard.runs(result), result
    assert scoreboard.passes(result), scoreboard.reason(result)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_family(family: str, attention: str) -> None:
    """Not how many graphs there are without kvpass: `make support ARGS=--graphs` counts those of all families."""
    check(family, attention, "graphs", "masks")


@pytest.mark.usefixtures("one_trace")
def test_attentions_that_share_heads_over_one_cache() -> None:
    """DiffLlama's second shape: two attentions read one cache, and each KV head serves two query heads of both."""
    for attention in ("sdpa", "eager"):
        model = build("diffllama", attention)
        result = case.run("diffllama", attention, skip=("graphs", "masks"), other=True)
        assert build("diffllama", attention, True).config.num_key_value_heads != model.config.num_key_value_heads
        assert scoreboard.runs(result), result
        assert not scoreboard.wrong_in_other_shape({"other shape": result}), result


@pytest.mark.parametrize(
    ("family", "attention"), [("gpt2", "eager"), pytest.param("gpt_oss", "eager", marks=pytest.mark.wide)]
)
def test_family_and_its_graphs(family: str, attention: str) -> None:
    """The second has sinks, sliding layers, and experts whose sizes Dynamo guards."""
    check(family, attention, "masks")


@pytest.mark.parametrize(
    ("family", "attention", "prompt"),
    [
        ("llama", "sdpa", "causal tokens"),
        ("bloom", "eager", "causal mean tokens, and adds a tensor by key"),
        pytest.param("blt", "sdpa", "causal window=24 tokens", marks=pytest.mark.wide),
        pytest.param("gemma2", "eager", "causal mean tokens", marks=pytest.mark.wide),
    ],
)
def test_masks_are_proved(family: str, attention: str, prompt: str) -> None:
    """In a prompt, a step and a second turn; then nothing of queries times keys is made: `make support ARGS=--masks`
    tells it of all families.
    """
    words = said(build(family, attention), padded=True)
    assert words == {phase: [prompt] for phase in ("prefill", "decode", "extend")}


def test_a_mask_that_is_left_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retirement, "retire_masks", lambda self, nodes: frozenset())
    with pytest.raises(AssertionError, match="queries times keys"):
        said(build("llama", "sdpa"), padded=True)


def test_a_wrong_policy_is_noticed() -> None:
    """The naive side really decides: another policy's choices are not float32's view of h2o's."""
    with pytest.raises(AssertionError, match=r"layer 0, row 0, head 0: it (keeps|evicts)"):
        case.against_oracle("gpt2", build("gpt2", "eager"), "streaming_llm", {"padded": True})


@pytest.mark.parametrize("policy", ["h2o", "tova", "snapkv", "roco"])
def test_both_oracles_agree(policy: str) -> None:
    """The oracle that follows keys through any model, and the one that replaces the attention function."""
    model = build("llama", "eager")
    known, oracle = Oracle(model, policy, 40), AnyOracle(model, policy, 40, 0, {0, 1})
    feed = Feed(model, oracle)
    ids, mask = prompt()
    for step in range(4):
        logits = feed(ids, mask if step == 0 else None)
        inputs = {name: t for name, t in feed.inputs(ids).items() if name in ("attention_mask", "position_ids")}
        torch.testing.assert_close(logits, known(ids, **inputs), rtol=1e-4, atol=1e-4)
        for layer in (0, 1):
            for ours, theirs in zip(oracle.simulator.kept(layer), known.simulator.kept(layer), strict=True):
                assert [p.tolist() for p in ours] == [p.tolist() for p in theirs]
        ids = logits.argmax(-1, keepdim=True)
