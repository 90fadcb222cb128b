"""Models that see pictures: at full budget the model's own answers, at a quarter what every head keeps is the oracle's,
with and without a picture, also in a second turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny, zoo
from models.turns import GREEDY
from oracle.drive import compare_logits, kept_positions
from oracle.judge import AnyJudge
from oracle.simulator import Simulator
from spelling import cache_of, with_cache
from torch import Tensor

import kvpass

BUDGET = 24
MAKERS = {"llava": zoo.llava, "qwen2_vl": zoo.qwen2_vl}


def words(length: int, seed: int) -> Tensor:
    """None of them a token that stands for a picture."""
    return tiny.tokens(1, length, seed) % (zoo.VIDEO - 1) + 1


def asked(name: str, picture: bool) -> dict[str, Any]:
    """A prompt, and what is to be seen in its midst: 4 tokens."""
    if not picture:
        return {"input_ids": words(70, 1)}
    generator = torch.Generator().manual_seed(4)
    if name == "llava":
        seen, shown = torch.full((1, 4), zoo.IMAGE), {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    else:
        seen = torch.tensor([[zoo.VISION_START, *[zoo.IMAGE] * 4, zoo.VISION_END]])
        shown = {"pixel_values": torch.randn(16, 96, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": torch.cat([words(20, 1), seen, words(50, 2)], 1), **shown}


def kinds(ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are pictures'."""
    return {"mm_token_type_ids": (ids == zoo.IMAGE).int()}


def said(model: Any, name: str, given: dict[str, Any], **more: Any) -> Any:
    ids = given["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "output_logits": True, **GREEDY}
    told: dict[str, Any] = {"suppress_tokens": [zoo.VIDEO, zoo.VISION_END, zoo.VISION_START, zoo.IMAGE]}
    if name == "qwen2_vl":
        told |= kinds(ids)
    return model.generate(**given, **settings, **told, **more)


def talked(model: Any, name: str, picture: bool) -> list[Any]:
    """Two turns: the second without a new picture."""
    given = asked(name, picture)
    first = said(model, name, given)
    more = {**given, "input_ids": torch.cat([first.sequences, words(5, 3)], 1)}
    more.pop("pixel_values", None)
    return [first, said(model, name, more, **with_cache(model, cache_of(first)))]


@pytest.mark.wide
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", MAKERS)
def test_pictures_and_words(name: str) -> None:
    model = MAKERS[name]()
    full = kvpass.compile(model, "full", inner="eager")
    small = kvpass.compile(model, {"name": "mine", "extends": "h2o", "min_slots": 8}, BUDGET, inner="eager")
    for picture in (False, True):
        for ours, theirs in zip(*(talked(one, name, picture) for one in (full, model)), strict=True):
            assert torch.equal(ours.sequences, theirs.sequences)
        judge = AnyJudge(model, lambda: Simulator("h2o", BUDGET, 8), {0})
        for ours, theirs in zip(*(talked(one, name, picture) for one in (small, judge)), strict=True):
            for got, want in zip(ours.logits, theirs.logits, strict=True):
                compare_logits(got, want)
            assert torch.equal(ours.sequences, theirs.sequences)
        (positions,) = kept_positions(cache_of(ours))
        kept = [[head.tolist() for head in row] for row in judge.of(cache_of(theirs)).kept(0)]
        assert kept == [[sorted(at for at in head if at >= 0) for head in row] for row in positions.tolist()]
