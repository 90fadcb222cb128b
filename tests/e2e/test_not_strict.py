"""strict=False: where the model itself would run, a compiled one does, with the model's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.hosts import DIM, HEADS, LAYERS, WIDTH, Decoder, Pair
from torch import Tensor

import kvpass
from kvpass.errors import DeclinedError, ForeignCacheError, NothingRewritten

BUDGET = 12


class Reads(Decoder):
    """In the prompt, the keys of some layers are read by something else: there they cannot be rewritten."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, ids: Tensor, past: list[Pair]) -> tuple[Tensor, list[Pair]]:
        x, new = self.emb(ids), []
        b, t = ids.shape
        for layer, project in enumerate(self.qkv):
            q, k, v = project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([past[layer][0], k], 2), torch.cat([past[layer][1], v], 2)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=t > 1).transpose(1, 2).reshape(b, t, WIDTH)
            if t > 1 and layer in self.layers:
                x = x + k.exp().mean()
            new.append((k, v))
        return self.out(x), new


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(seed))


def empty() -> list[Pair]:
    return [(torch.empty(1, HEADS, 0, DIM), torch.empty(1, HEADS, 0, DIM)) for _ in range(LAYERS)]


def converse(model: Any, prompt: int, steps: int, past: list[Pair] | None = None) -> tuple[Tensor, list[Pair]]:
    past, logits = empty() if past is None else past, []
    with torch.no_grad():
        for at in range(steps + 1):
            out, past = model(tokens(prompt if at == 0 else 1, at), past)
            logits.append(out[:, -1])
    return torch.stack(logits), past


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_a_dense_prompt_goes_on_dense(layers: tuple[int, ...], inner: str) -> None:
    """The layers that were declined in the prompt hold data, which the step's graph was made to rewrite."""
    compiled = kvpass.compile(Reads(layers).eval(), "full", inner=inner, strict=False)
    for prompt, steps in ((30, 8), (37, 3)):
        expected, dense = converse(Reads(layers).eval(), prompt, steps)
        found, past = converse(compiled, prompt, steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        sizes = [k.untyped_storage().nbytes() for k, _ in past]
        assert [size > 4 for size in sizes] == [layer in layers for layer in range(LAYERS)]
        assert [k.shape for k, _ in past] == [k.shape for k, _ in dense]
    assert len(compiled.kvpass.graphs) <= 4


def test_layers_that_are_compressed_evict() -> None:
    compiled = kvpass.compile(Reads((0,)).eval(), "streaming_llm", BUDGET, inner="eager", strict=False)
    _, past = converse(compiled, 30, 4)
    data = kvpass.report(past).to_dict()
    assert data["slot_bytes"] == 2 * HEADS * (BUDGET + 1) * DIM * 4
    assert data["bytes"] == data["slot_bytes"] + 2 * HEADS * 34 * DIM * 4


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
def test_caches_of_the_model_itself() -> None:
    """Given to a compiled model first, or after compressed ones, they are real and stay so."""
    model = Reads(()).eval()
    _, past = converse(model, 30, 2)
    expected, _ = converse(model, 1, 3, past)
    fresh = kvpass.compile(model, "full", inner="eager", strict=False)
    used = kvpass.compile(model, "full", inner="eager", strict=False)
    converse(used, 20, 3)
    for compiled in (fresh, used):
        found, theirs = converse(compiled, 1, 3, past)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert all(k.untyped_storage().nbytes() > 4 for k, _ in theirs)
        compressed = converse(compiled, 20, 3)[1]
        assert all(k.untyped_storage().nbytes() == 4 for k, _ in compressed)
    with pytest.raises(ForeignCacheError):
        converse(kvpass.compile(model, "full", inner="eager"), 1, 1, past)


STAGES = {
    "scan": "kvpass.sites.scan.scan",
    "plan": "kvpass.plan.plan.plan",
    "lower": "kvpass.lowering.lower.lower",
    "verify": "kvpass.proof.verify.verify",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_of_ours(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what a stage cannot do is a decline with a name, or leaves the graph as it is."""

    def fault(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(STAGES[stage], fault)
    with pytest.raises(DeclinedError, match=f"stage '{stage}': IndexError: tuple index out of range") as raised:
        converse(kvpass.compile(Reads(()).eval(), "full", inner="eager"), 30, 1)
    assert __file__ in raised.value.where
    assert "report" in raised.value.hint
    compiled = kvpass.compile(Reads(()).eval(), "full", inner="eager", strict=False)
    with pytest.warns(UserWarning, match="stays as the model wrote it"):
        found, past = converse(compiled, 30, 3)
    assert torch.equal(found, converse(Reads(()).eval(), 30, 3)[0])
    assert all(k.untyped_storage().nbytes() > 4 for k, _ in past)
    assert not any(record.plan for record in compiled.kvpass.graphs)


def test_a_fault_in_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is compressed by then, and what it evicted cannot be had back: an error, with a name."""
    compiled = kvpass.compile(Reads(()).eval(), "full", inner="eager", strict=False)
    _, past = converse(compiled, 30, 0)

    def fault(*args: Any, **kwargs: Any) -> Any:
        raise IndexError

    monkeypatch.setattr("kvpass.lowering.lower.lower", fault)
    with pytest.warns(UserWarning, match="stays as the model wrote it"), pytest.raises(kvpass.errors.ShellDataError):
        converse(compiled, 1, 0, past)


def test_a_model_without_a_cache_says_so() -> None:
    compiled = kvpass.compile(Reads((0, 1)).eval(), "full", inner="eager", strict=False)
    with pytest.warns(NothingRewritten):
        converse(compiled, 30, 0)


class Buffered(Decoder):
    """Buffers of the caller's, written by index. In prompts of `dense` tokens something else reads the keys."""

    dense = 31

    def forward(self, ids: Tensor, past: list[Pair], at: Tensor) -> Tensor:
        x = self.emb(ids)
        b, t = ids.shape
        for layer, project in enumerate(self.qkv):
            q, k, v = project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            keys, values = past[layer]
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            sees = torch.arange(keys.shape[2])[None] <= at[:, None]
            x = x + F.scaled_dot_product_attention(q, keys, values, attn_mask=sees).transpose(1, 2).reshape(b, t, WIDTH)
            if t == self.dense:
                x = x + keys.exp().mean()
        return self.out(x)


def room(length: int = 64) -> list[Pair]:
    return [(torch.zeros(1, HEADS, length, DIM), torch.zeros(1, HEADS, length, DIM)) for _ in range(LAYERS)]


def in_buffers(model: Any, past: list[Pair], calls: list[int], start: int = 0) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for n in calls:
            found.append(model(tokens(n, start), past, torch.arange(start, start + n)))
            start += n
    return found


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
def test_buffers_of_a_dense_prompt_go_on_dense() -> None:
    compiled = kvpass.compile(Buffered().eval(), "h2o", BUDGET, inner="eager", strict=False)
    calls = [Buffered.dense, 1, 1, 1]
    expected = in_buffers(Buffered().eval(), room(), calls)
    torch.testing.assert_close(in_buffers(compiled, room(), calls), expected, rtol=1e-4, atol=1e-5)


class Placed(Decoder):
    """Buffers of the model's own, written at a number that the caller says, as in Meta's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.past = room()

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x = self.emb(ids)
        b, t = ids.shape
        for (keys, values), project in zip(self.past, self.qkv, strict=True):
            q, k, v = project(x).view(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            keys[:, :, start : start + t] = k
            values[:, :, start : start + t] = v
            k, v = keys[:, :, : start + t], values[:, :, : start + t]
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=t > 1).transpose(1, 2).reshape(b, t, WIDTH)
        return self.out(x)


@pytest.mark.parametrize("strict", [True, False])
def test_a_place_that_is_a_number_makes_no_graph_per_token(strict: bool) -> None:
    compiled = kvpass.compile(Placed().eval(), "streaming_llm", BUDGET, inner="eager", strict=strict)
    with torch.no_grad():
        for prompt in (14, 17):
            compiled(tokens(prompt, 0), 0)
            for at in range(4):
                compiled(tokens(1, at), prompt + at)
    assert len(compiled.kvpass.graphs) <= 4


def test_a_copy_of_a_buffer_that_holds_no_keys_is_refused() -> None:
    """The caller's buffer stands for a compressed cache, so what is copied out of it is nothing."""
    compiled = kvpass.compile(Buffered().eval(), "h2o", BUDGET, inner="eager", strict=False)
    past = room()
    in_buffers(compiled, past, [20, 1])
    larger = room(128)
    for (k, v), (wide_k, wide_v) in zip(past, larger, strict=True):
        wide_k[:, :, :64].copy_(k)
        wide_v[:, :, :64].copy_(v)
    with pytest.raises(ForeignCacheError):
        in_buffers(compiled, larger, [1], start=21)
