"""Judge Q: embeddings behind the prompt ask what is to stay, and go. Against full attention in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import tiny
from spelling import with_cache
from transformers import DynamicCache

import kvpass
from kvpass.errors import CacheError

PROBES, SLOTS, HEADS, KV_HEADS = 32, 40, 6, 2


def asked(model: Any, lengths: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The call, and which of its tokens are probes."""
    ids, mask = tiny.left_padded(lengths)
    probes = torch.randn(PROBES, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    embeds = torch.cat([model.get_input_embeddings()(ids), probes.expand(len(ids), -1, -1)], 1)
    mask = torch.cat([mask, torch.ones(len(ids), PROBES, dtype=mask.dtype)], 1)
    drop = torch.arange(embeds.shape[1]).expand(len(ids), -1) >= ids.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"inputs_embeds": embeds.detach(), "attention_mask": mask, "position_ids": positions}, drop


def test_kept_positions() -> None:
    model, lengths = tiny.llama(HEADS, KV_HEADS), [120, 90]
    call, drop = asked(model, lengths)
    eager = tiny.llama(HEADS, KV_HEADS)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    compiled, cache = kvpass.compile(model, "judge_q", SLOTS, inner="eager"), DynamicCache(config=model.config)
    with torch.no_grad(), kvpass.marked(drop=drop):
        out = compiled(**call, **with_cache(compiled, cache))
        eager.double()
        alone = [call["inputs_embeds"][b : b + 1, 120 - n :].double() for b, n in enumerate(lengths)]
        rows = [eager(inputs_embeds=x, output_attentions=True) for x in alone]
    for b, row in enumerate(rows):
        torch.testing.assert_close(out.logits[b, 120 - lengths[b] :], row.logits[0].float(), atol=1e-3, rtol=1e-3)
    for layer, view in enumerate(kvpass.inspect(cache).layers):
        for b, count in enumerate(lengths):
            pad = 120 - count
            for h in range(KV_HEADS):
                group = rows[b].attentions[layer][0, h * HEADS // KV_HEADS : (h + 1) * HEADS // KV_HEADS, -PROBES:]
                score = group.numpy().mean(0).sum(0)[:count]
                best = sorted(range(count), key=lambda j, s=score: (-s[j], j))[:SLOTS]
                assert view.positions[b, h].tolist() == [pad + j for j in sorted(best)], (layer, b, h)
    first = out.logits[:, 119:120].argmax(-1)
    with torch.no_grad():
        mask = torch.cat([call["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        compiled(first, **with_cache(compiled, cache), attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1)
    for view in kvpass.inspect(cache).layers:
        assert view.positions.shape[2] == SLOTS
        assert not np.isin(view.positions.numpy(), range(120, 152)).any()


def test_a_token_is_not_kept_and_dropped() -> None:
    every = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(CacheError, match="kept and dropped"), kvpass.marked(keep=every, drop=every):
        pass
