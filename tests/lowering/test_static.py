"""Decode graphs in their static form: nothing changes from step to step but what tensors hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import plain
from models.stand_in import READS, stand_in
from models.tiny import SIZES, left_padded, llama
from torch import fx
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    PretrainedConfig,
)

import kvpass
from kvpass.graph.calls import call_name, example
from kvpass.lowering import static as module
from kvpass.lowering.static import Static
from kvpass.lowering.written import memory_of, written_by

pytestmark = pytest.mark.usefixtures("in_torch")

__all__ = ["stand_in"]

FAMILIES: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=None),
    "gemma3": Gemma3TextConfig(**SIZES, num_hidden_layers=2, layer_types=["full_attention"] * 2),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, pad_token_id=0, eos_token_id=None),
    "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=97, pad_token_id=0, eos_token_id=None),
}


@contextmanager
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Static | str]]:
    """The static forms that are made inside."""
    found: list[Static | str] = []
    real = module.static

    def noting(*args: Any) -> Static | str:
        found.append(real(*args))
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(module, "static", noting)
        yield found


def check(form: Static | str) -> None:
    """What a device needs in order to record a graph."""
    assert isinstance(form, Static), form
    inputs = [n for n in form.gm.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == len(form.feeds.inputs) + 1
    changing = {n for n, feed in zip(inputs, form.feeds.inputs, strict=False) if feed.length is not None}
    for node in form.gm.graph.nodes:
        assert call_name(node) not in (*READS, "tolist", "numpy", "cpu"), node
        for value in written_by(node):  # all that is changed is state, or an input that stays where it is
            held = [n for n in inputs if memory_of(n) == memory_of(value)]
            places = [form.feeds.inputs[inputs.index(n)].place for n in held]
            ours = [n for n in held if "kvpass" in n.meta]
            assert ours or not held or set(places) <= form.feeds.changed
    check_sizes(form.gm, changing)


def check_sizes(gm: fx.GraphModule, changing: set[fx.Node]) -> None:
    """Numbers that stand for a length are sizes of what is made, and nothing else is as long that is not padded."""
    from kvpass.lowering.static_calls import SHAPED

    numbers = set(changing)
    for node in gm.graph.nodes:
        read = numbers & set(node.all_input_nodes)
        if read and isinstance(example(node), torch.SymInt):
            numbers.add(node)
        elif read:
            assert call_name(node) in (*SHAPED, "arange", "full", "getitem"), node


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some(2)
def test_families(family: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family], attn_implementation="eager" if family == "bloom" else "sdpa"
    )
    ids, mask = left_padded([20, 11])
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    compiled = kvpass.compile(model.eval(), "h2o", 0.4, inner="eager", mode="reduce-overhead")
    with made(monkeypatch) as found:
        out = compiled.generate(ids, **given)
    (form,) = found
    check(form)
    assert stand_in.replayed >= 4
    torch._dynamo.reset()
    assert torch.equal(out, kvpass.compile(model, "h2o", 0.4, inner="eager").generate(ids, **given))


def decoded(model: Any, steps: int = 6) -> torch.Tensor:
    found = []
    with torch.no_grad():
        logits, cache = model(plain.tokens(2, 20))
        for at in range(steps):
            logits, cache = model(plain.tokens(2, 1, seed=at), cache)
            found.append(logits)
    return torch.cat(found)


class Positions(plain.Decoder):
    """Reads the length in all the ways that a device can."""

    def __init__(self) -> None:
        super().__init__()
        self.places = torch.nn.Embedding(64, self.embed.embedding_dim)
        self.register_buffer("table", torch.randn(64, self.embed.embedding_dim))

    def forward(self, ids: torch.Tensor, cache: Any = None) -> Any:
        past = 0 if cache is None else cache[0][0].shape[2]
        new, table = ids.shape[1], self.table
        x = self.embed(ids) + self.places(torch.arange(past, past + new)) + self.places(torch.arange(new) + past)
        x = x + table[past : past + new] + table.narrow(0, past, new)  # type: ignore[index, operator]  # a buffer
        if new == 1:
            x = x + table[past] + table.select(0, past)  # type: ignore[index, operator]
            x = x + self.places(torch.full((1,), past)) + (torch.arange(2.0) * past).sum() * 0.01
            ever = torch.arange(past + 1).cumsum(0)
            x = x + (ever[-1] + ever[-1:] + ever[:4] + ever[1]).sum() * 0.01
        grown = []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[i])
            grown.append(pair)
        return self.head(x), tuple(grown)


@pytest.mark.parametrize("kind", [plain.Decoder, plain.GroupedDecoder, Positions])
def test_plain_decoders(kind: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(monkeypatch) as found:
        out = decoded(kvpass.compile(plain.make(kind), "h2o", 0.4, inner="eager", mode="reduce-overhead"))
    check(found[0])
    assert stand_in.replayed >= 3
    torch._dynamo.reset()
    assert torch.equal(out, decoded(kvpass.compile(plain.make(kind), "h2o", 0.4, inner="eager")))


def length(cache: Any) -> Any:
    return cache[0][0].shape[2]


READERS = {
    "sum reads all columns of a tensor that grows": lambda cache: torch.arange(length(cache) + 1).sum() * 0.01,
    "arange is as long as the past": lambda cache: torch.arange(length(cache)).float().mean(),
    "getitem reads a part": lambda cache: torch.arange(length(cache) + 1)[-4:-1] * 0.01,
    "getitem reads a part that grows": lambda cache: torch.ones(64)[: length(cache)].mean(),
    "cat reads all columns of a tensor that grows": lambda cache: torch.cat(
        [torch.zeros(length(cache) + 1), torch.ones(1)]
    ).mean(),
    "the number": lambda cache: torch.arange(4) * (length(cache) * length(cache)) * 0.001,
    "mul reads the length in a dtype": lambda cache: (torch.ones(1, dtype=torch.bfloat16) * length(cache)).float(),
}


@pytest.mark.parametrize("why", READERS)
@pytest.mark.some(4)
def test_what_is_not_static(why: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to read a length that no device can follow is named, and what the model says is what it says."""

    class Reader(plain.GroupedDecoder):
        def forward(self, ids: torch.Tensor, cache: Any = None) -> Any:
            logits, grown = super().forward(ids, cache)
            return (logits if cache is None else logits + READERS[why](cache).sum()), grown

    with made(monkeypatch) as found:
        out = decoded(kvpass.compile(plain.make(Reader), "h2o", 0.4, inner="eager", mode="reduce-overhead"), 3)
    assert str(found[0]).startswith(why)
    assert stand_in.recorded == 0
    torch._dynamo.reset()
    assert torch.equal(out, decoded(kvpass.compile(plain.make(Reader), "h2o", 0.4, inner="eager"), 3))


def test_the_check_can_fail(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph as it was before reads the length in each layer."""
    with made(monkeypatch) as found:
        decoded(kvpass.compile(plain.make(Positions), "h2o", 0.4, inner="eager", mode="reduce-overhead"), 1)
    (form,) = found
    assert isinstance(form, Static)
    used = [n for n in form.gm.graph.nodes if n.name == "kvpass_at"]
    assert used[0].users
    here = next(n for n in form.gm.graph.nodes if call_name(n) == "long")
    with form.gm.graph.inserting_before(here):
        here.replace_all_uses_with(form.gm.graph.call_method("item", (here.args[0],)))
    with pytest.raises(AssertionError):
        check(form)


@pytest.mark.parametrize("cache", ["static", None])
def test_llama(cache: str | None, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = left_padded([20, 11])
    model = kvpass.compile(llama(), "h2o", 0.4, inner="eager", mode="reduce-overhead")
    more = {} if cache is None else {"cache_implementation": cache}
    with made(monkeypatch) as found:
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **more)
    (form,) = found
    check(form)
    assert isinstance(form, Static)
    assert bool(form.feeds.changed) == (cache == "static")
    wide = [feed for feed in form.feeds.inputs if feed.wide]
    assert len(wide) == (cache is None), "the 2-d mask"
    assert not [feed for feed in form.feeds.inputs if feed.length is not None], "masks are proved: no length is left"
