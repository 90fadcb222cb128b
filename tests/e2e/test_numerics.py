"""Numbers that go wrong elsewhere: half precision, rows without a token, infinities, ties, and the shortest prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.turns import GREEDY
from oracle.chat import gentle
from spelling import cache_of, with_cache
from torch import Tensor
from transformers import DynamicCache

import kvpass

E: dict[str, Any] = {"inner": "eager"}
SMALL: dict[str, tuple[Any, int | None]] = {
    "h2o": ({"name": "mine", "extends": "h2o", "min_slots": 8}, 20),
    "ragged": ({"name": "mine", "extends": "ada_snapkv", "min_slots": 8}, 48),
    "codes": ({"name": "mine", "extends": "h2o", "store": "int4", "min_slots": 40}, 48),
    "tiers": ({"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}, "min_slots": 8}, 20),
    "kivi": ("kivi", None),
}


def compiled(policy: str, model: Any = None) -> Any:
    return kvpass.compile(model or gentle(), *SMALL[policy], **E)


class Talk:
    """A conversation through a model, call by call; the caller's columns count for positions."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.mask = model, DynamicCache(config=model.config), None

    def __call__(self, mask: Tensor, **tokens: Tensor) -> Tensor:
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        given = {"attention_mask": self.mask, "position_ids": positions, "use_cache": True, **tokens}
        with torch.no_grad():
            logits: Tensor = self.model(**given, **with_cache(self.model, self.cache)).logits
        return logits

    @property
    def layers(self) -> list[Any]:
        return kvpass.inspect(self.cache).layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """At full budget the model's own logits, as near as two orders of summation are; below it, what a float32 model of
    the same weights keeps.
    """
    model = tiny.llama(layers=1).to(dtype)
    wide = tiny.llama(layers=1).to(dtype).float()
    ids, ones = tiny.tokens(2, 80), torch.ones(2, 80, dtype=torch.long)
    talks = [Talk(one) for one in (kvpass.compile(model, "full", **E), model)]
    small = [Talk(compiled("h2o", one)) for one in (model, wide)]
    for tokens in (ids, *tiny.tokens(2, 8, seed=1).split(1, 1)):
        got, want = (talk(ones[:, : tokens.shape[1]], input_ids=tokens) for talk in talks)
        assert got.dtype is dtype
        torch.testing.assert_close(got, want, atol=float(want.abs().max()) / 64, rtol=0)
        for talk in small:
            talk(ones[:, : tokens.shape[1]], input_ids=tokens)
    (ours,), (theirs,) = (talk.layers for talk in small)
    assert ours.keys.dtype is dtype
    assert ours.scores.dtype is torch.float32
    same = [
        len(set(a.tolist()) & set(b.tolist()))
        for a, b in zip(ours.positions.flatten(0, 1), theirs.positions.flatten(0, 1), strict=True)
    ]
    assert min(same) >= 17, "of 20"


def test_ties_of_half_precision_are_broken_in_float32() -> None:
    """knorm: norms of bfloat16 keys, of which most would be equal in bfloat16 (kvpress)."""
    model = tiny.llama(layers=1).to(torch.bfloat16)
    policy = {"name": "mine", "extends": "knorm", "min_slots": 8, "protect": {"sinks": 4, "recent": 10}}
    talk, plain = Talk(kvpass.compile(model, policy, 40, **E)), Talk(model)
    ids, ones = tiny.tokens(2, 160), torch.ones(2, 160, dtype=torch.long)
    talk(ones, input_ids=ids)
    plain(ones, input_ids=ids)
    (view,) = talk.layers
    norms = plain.cache.layers[0].keys.float().norm(dim=-1)
    assert len(norms.to(torch.bfloat16).unique()) < len(norms.unique()) / 2, "half precision would tie"
    for b in range(2):
        for h in range(2):
            held = view.positions[b, h].tolist()
            out = [at for at in range(160) if at not in held]
            free = [at for at in held if 4 <= at < 150]  # neither first nor recent tokens
            assert max(norms[b, h, free]) <= min(norms[b, h, [at for at in out if 4 <= at < 150]])


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", SMALL)
def test_rows_without_a_token(policy: str) -> None:
    """Of every length modulo 32: a row that is all padding changes nothing in the other, in the prompt and later."""
    talk, full, model = compiled(policy), kvpass.compile(gentle(), "full", **E), gentle()
    for length in range(1, 34) if policy in ("h2o", "ragged") else (1, 2, 31, 32, 33):
        ids = tiny.tokens(2, length, seed=length)
        mask = torch.stack([torch.zeros(length), torch.ones(length)]).long()
        three = [Talk(one) for one in (talk, full, model)]
        for tokens, shown in (
            (ids, mask),
            (tiny.tokens(2, 1), torch.ones(2, 1).long()),
            (tiny.tokens(2, 1), torch.ones(2, 1).long()),
        ):
            got, exact, want = (one(shown, input_ids=tokens)[1] for one in three)
            torch.testing.assert_close(exact, want, atol=2e-4, rtol=1e-3)
            assert got.isfinite().all()
            if length <= 8 and policy in ("h2o", "ragged"):  # nothing is evicted yet
                torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", SMALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_sequence_stays_alone(policy: str, bad: float) -> None:
    """Embeddings of one token of row 0 are no numbers: row 1 is what it is beside a sound row."""
    model = compiled(policy)
    embed = gentle().get_input_embeddings()
    ids, ones = tiny.tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    talks = Talk(model), Talk(model)
    for at, tokens in enumerate(
        (ids, *tiny.tokens(2, 6, seed=3).split(1, 1), tiny.tokens(2, 5, seed=4), tiny.tokens(2, 1))
    ):
        rows = embed(tokens).detach()
        hurt = rows.clone()
        if at in (0, 4):
            hurt[0, tokens.shape[1] // 2] = bad
        sound, broken = (
            talk(ones[:, : tokens.shape[1]], inputs_embeds=x) for talk, x in zip(talks, (rows, hurt), strict=True)
        )
        assert not broken[0].isfinite().all()
        torch.testing.assert_close(broken[1], sound[1], atol=1e-5, rtol=1e-5)
    for one, other in zip(*(talk.layers for talk in talks), strict=True):
        width = min(one.positions.shape[-1], other.positions.shape[-1])
        assert torch.equal(one.positions[1, :, :width], other.positions[1, :, :width])


def test_huge_logits_in_half_precision() -> None:
    """kvpress#268: keys that were to be hidden overflowed."""
    model = tiny.llama(layers=1).to(torch.float16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 60
        model.model.layers[0].self_attn.k_proj.weight *= 60
    ids, mask = tiny.left_padded([70, 40])
    for policy in ("ragged", "h2o"):
        talk, plain = Talk(compiled(policy, model)), Talk(model)
        for tokens, shown in ((ids, mask), (tiny.tokens(2, 1), mask[:, :1] | 1), (tiny.tokens(2, 1), mask[:, :1] | 1)):
            got, want = (one(shown, input_ids=tokens)[:, -1] for one in (talk, plain))
            assert want.isfinite().all()
            assert got.isfinite().all()
        (view,) = talk.layers
        keys = view.keys[view.positions >= 0].float()
        assert keys.norm(dim=-1).max() ** 2 / 4 > torch.finfo(torch.float16).max, "logits do overflow"
        assert view.scores[view.positions >= 0].isfinite().all()


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "ada_snapkv", "streaming_llm", "tova"])
def test_the_shortest_prompts(policy: str) -> None:
    """One to three tokens, shorter than any window: the model's tokens while all are kept, then the budget's."""
    model = gentle()
    small = kvpass.compile(model, {"name": "mine", "extends": policy, "min_slots": 8}, 48, **E)
    for length in (1, 2, 3):
        ids = tiny.tokens(2, length, seed=length)
        ones = torch.ones(2, 1, dtype=torch.long)
        ours, theirs = Talk(small), Talk(model)
        tokens = ids
        for step in range(56):
            got, want = (one(ones.expand(2, tokens.shape[1]), input_ids=tokens)[:, -1] for one in (ours, theirs))
            if length + step <= 48:
                torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
            tokens = want.argmax(-1, keepdim=True)
        for layer in ours.layers:
            live = (layer.positions >= 0).sum(-1)
            assert int(live.sum()) <= 48 * live.numel()
            assert int(layer.positions.max()) == length + 54


@pytest.mark.usefixtures("one_trace")
def test_a_budget_of_one_slot() -> None:
    """Of every head one token is left after each call; a query sees it and itself."""
    policy = {"name": "mine", "extends": "knorm", "min_slots": 1, "protect": {"sinks": 0, "recent": 0}}
    talk = Talk(kvpass.compile(gentle(), policy, 1, **E))
    ones = torch.ones(2, 1, dtype=torch.long)
    for tokens in (tiny.tokens(2, 20), *tiny.tokens(2, 5).split(1, 1), tiny.tokens(2, 4), tiny.tokens(2, 1)):
        logits = talk(ones.expand(2, tokens.shape[1]), input_ids=tokens)
        assert logits.isfinite().all()
        assert all(layer.positions.shape == (2, 2, 1) for layer in talk.layers)


def test_windows_of_no_token() -> None:
    """`x[-0:]` is all of x: with nothing protected the shortest keys stay, wherever they are; none is held whole."""
    model, ids, ones = tiny.llama(layers=1), tiny.tokens(1, 90), torch.ones(1, 90, dtype=torch.long)
    none = {"name": "mine", "min_slots": 8, "protect": {"sinks": 0, "recent": 0}}
    coded = {"k": "int4", "v": "int4", "residual": 0, "sinks": 0}
    plain = Talk(model)
    plain(ones, input_ids=ids)
    keys = plain.cache.layers[0].keys[0]
    for policy in ({**none, "extends": "knorm"}, {**none, "extends": "knorm", "store": coded}):
        talk = Talk(kvpass.compile(model, policy, 40, **E))
        talk(ones, input_ids=ids)
        (view,) = talk.layers
        for h in range(2):
            held, norms = view.positions[0, h], keys[h].norm(dim=-1)
            out = torch.ones(90, dtype=torch.bool)
            out[held] = False
            assert float(norms[held].max()) <= float(norms[out].min()) + 1e-5  # keys of a word are alike
            whole = (view.keys[0, h] - keys[h][held]).abs().amax(-1) < 1e-5
            assert whole.all() if "store" not in policy else not whole.any()


def test_an_empty_prompt_is_the_models_own_error() -> None:
    """Both refuse; the compiled model is usable afterwards."""
    model = tiny.llama(layers=1)
    small, ids = compiled("h2o", model), torch.empty(1, 0, dtype=torch.long)
    for one in (model, small):
        with pytest.raises(Exception, match=r"reshape|empty|index|size|shape|tokens"):
            one.generate(ids, attention_mask=ids, max_new_tokens=3, **GREEDY)
    ids = tiny.tokens(1, 40)
    out = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **GREEDY)
    assert kvpass.inspect(cache_of(out)).layers[0].positions.shape[-1] == 20
