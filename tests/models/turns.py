"""What generate is asked in many tests: two turns of a padded batch, and beams."""

from __future__ import annotations

from typing import Any

import torch
from models import tiny
from spelling import cache_of

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


def two_turns(model: Any, new: int = 12) -> tuple[torch.Tensor, Any]:
    """Logits [steps, 2, vocabulary] of what a model says in two turns of `new` tokens each, and the cache then."""
    ids, mask = tiny.left_padded([70, 55])
    asked = {**GREEDY, "max_new_tokens": new, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, **asked)
    more = torch.cat([out.sequences, tiny.tokens(2, 9, seed=5)], 1)
    shown = torch.cat([mask, torch.ones(2, more.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    given = {"cache" if "cache" in out else "past_key_values": cache_of(out)}
    again = model.generate(more, attention_mask=shown, **given, **asked)
    assert again.sequences.shape[1] == more.shape[1] + new
    return torch.stack([*out.logits, *again.logits]), cache_of(again)


def beams(model: Any, new: int) -> torch.Tensor:
    """Sequences of a search with three beams, whose rows are picked anew at each step."""
    ids, mask = tiny.left_padded([70, 45])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, num_beams=3, **GREEDY)
    found: torch.Tensor = out.sequences
    return found
