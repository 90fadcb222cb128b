"""What a policy asks of a model that does not have it is said before anything runs: which site, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, tiny
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

import kvpass
from kvpass.errors import PolicyError


class GatedBlock(plain.GroupedBlock):
    """A gate of the hidden states between the attention and its output projection."""

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o(attended.transpose(1, 2).flatten(2) * torch.sigmoid(self.q(x)))
        return x + self.ff(x)


class GatedDecoder(plain.Decoder):
    block = GatedBlock


def latents() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "first_k_dense_replace": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    }  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes)).eval()


ONE, GPT2 = (lambda: tiny.llama(layers=1)), (lambda: tiny.gpt2("sdpa"))
FITS = {"name": "mine", "extends": "h2o", "evicted": "refit"}

CASES = {
    "no projection": ("criticalkv", lambda: plain.make(GatedDecoder), "output projection, which was not found", "l1"),
    "latents": ("ada_snapkv", latents, "budgets of their own, but this attention keeps latents", "h2o or snapkv"),
    "latents merge": ("merging", latents, "merges what it evicts, but this attention keeps latents", "evicted: drop"),
    "latents fit": (FITS, latents, "fits slots to what it evicts, but this attention keeps", "evicted: drop"),
    "latents' keys": ("knorm", latents, "reads keys, but this attention keeps latents", "h2o or snapkv"),
    "a pyramid of one": ("pyramidkv", ONE, "over layers, but this graph holds one", "layers: uniform"),
    "one layer to share": ("cake", ONE, "over layers, but this graph holds one", "layers: uniform"),
    "nothing rotates": ("streaming_llm_reindexed", GPT2, "turns keys to new positions", "positions: kept"),
    "no queries before": ("compactor", GPT2, "reads queries before their rotation", "keydiff or snapkv"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str) -> None:
    policy, make, what, fix = CASES[case]
    compiled = kvpass.compile(make(), policy, 48, inner="eager")
    with pytest.raises(PolicyError) as caught, torch.no_grad():
        compiled(tiny.tokens(1, 60) % 61)
    text = " ".join(str(caught.value).split())
    assert f"policy '{policy if isinstance(policy, str) else policy['name']}'" in text
    assert what in text
    assert fix in text.partition("what to do:")[2]
    assert "where: " in text
    assert ".py" in text
