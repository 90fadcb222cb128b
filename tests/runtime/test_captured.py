"""Steps that are recorded once and replayed, with a stand-in for the device (`models.stand_in`)."""

from __future__ import annotations

from typing import Any

import torch
from models.stand_in import StandIn, stand_in
from models.tiny import left_padded, llama, one_llama, tokens

import kvpass
from kvpass.runtime.shell import find

__all__ = ["stand_in"]


def generated(model: Any, new: int = 40, **more: Any) -> Any:
    ids, mask = left_padded([30, 17])
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **more
    )


def counts(cache: Any) -> Any:
    return find(cache.layers[0].keys).steps


def compiled(model: Any, policy: str = "h2o", mode: str = "reduce-overhead", **more: Any) -> Any:
    return kvpass.compile(model, policy, 0.3, inner=more.pop("inner", "eager"), mode=mode, **more)


def test_generate_replays(stand_in: StandIn) -> None:
    model = llama()
    plain, recorded = (generated(compiled(model, mode=mode)) for mode in ("default", "reduce-overhead"))
    assert torch.equal(plain.sequences, recorded.sequences)
    found = counts(recorded.past_key_values)
    print(found)
    assert found.captures == stand_in.recorded > 0
    assert found.replays == stand_in.replayed
    assert found.replays + found.eager == 39
    assert counts(plain.past_key_values).replays == 0
