"""Under autocast a model is refused by that name, and runs dense and right under strict=False."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from transformers import GPT2Config, GPT2LMHeadModel

import kvpass


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=256, vocab_size=128, bos_token_id=None)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny.llama(4, 2, layers=1), gpt2], ids=["llama", "gpt2"])
def test_autocast_is_refused_by_its_name(make: Any) -> None:
    model, ids = make(), tiny.tokens(1, 90)
    compiled = kvpass.compile(model, "h2o", 40, inner="eager")
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with pytest.raises(kvpass.errors.DeclinedError, match="AUTOCAST") as told, torch.no_grad(), half:
        compiled(input_ids=ids, use_cache=True)
    assert 'called under torch.autocast("cpu", torch.bfloat16)' in str(told.value)
    assert "outside of torch.autocast" in str(told.value)
    dense = kvpass.compile(model, "h2o", 40, inner="eager", strict=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (m(input_ids=ids, use_cache=True).logits for m in (dense, model))
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
