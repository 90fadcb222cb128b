"""Whoever calls a compiled model, by whatever door: the cache is kvpass' own, or there was an error."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import nest, plain, tiny
from spelling import cache_of, with_cache
from torch import nn
from transformers import DynamicCache

import kvpass
from kvpass.errors import DeclinedError, KVPassError, NothingRewritten, RecompileError, ShellDataError

BUDGET = 20
EAGER: dict[str, Any] = {"policy": "h2o", "budget": BUDGET, "inner": "eager"}


def own(cache: Any) -> bool:
    """Is every tensor in a cache a stand-in over one element, of a store that holds the budget?"""
    pairs = [t for pair in cache for t in pair]
    held = kvpass.report(cache).to_dict()
    return all(t.untyped_storage().nbytes() == t.element_size() for t in pairs) and all(
        site["live_max"] <= BUDGET for site in held["sites"]
    )


NESTS = given(
    fault=st.sampled_from([None, *nest.FAULTS]),
    where=st.integers(0, 1),
    wrappers=st.lists(st.sampled_from(list(nest.WRAPPERS)), max_size=2),
    copied=st.sampled_from(list(nest.COPIES)),
    entry=st.sampled_from(list(nest.ENTRIES)),
    used=st.booleans(),
)


def some(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def nested(fault: Any, where: int, wrappers: Any, copied: str, entry: str, used: bool) -> None:
    torch._dynamo.reset()
    model = nest.decoder()
    if fault is not None:
        nest.FAULTS[fault](model.blocks[where])
    for name in wrappers:
        model = nest.WRAPPERS[name](model)
    ids = plain.tokens(1, 40)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRewritten)
            compiled = kvpass.compile(model, **EAGER)
            if used:
                nest.run(compiled, ids, 1)
            cache = nest.ENTRIES[entry](nest.COPIES[copied](compiled), ids, 4)
    except KVPassError:
        return
    except (AttributeError, NotImplementedError, TypeError, pickle.PicklingError):  # no such door, or a local function
        return
    assert own(cache), "dense in silence"


def test_nests_of_hosts() -> None:
    some(10)(NESTS(nested))()


@pytest.mark.wide
def test_more_nests_of_hosts() -> None:
    some(25)(NESTS(nested))()


DOORS = [
    *((wrapper, entry) for wrapper in ("delegate", "by forward") for entry in ("call", "forward", "generate", "inner")),
    *((wrapper, entry) for wrapper in ("attributes", "torch.compile") for entry in ("call", "forward")),
    ("nameless", "generate"),
    ("nameless", "inner"),
]


@pytest.mark.parametrize(("wrapper", "entry"), DOORS)
@pytest.mark.some(6)
def test_every_door_of_a_wrapper_evicts(wrapper: str, entry: str) -> None:
    compiled = kvpass.compile(nest.WRAPPERS[wrapper](nest.decoder()), **EAGER)
    assert own(nest.ENTRIES[entry](compiled, plain.tokens(1, 40), 4))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", list(nest.COPIES))
@pytest.mark.some(4)
def test_copies_evict(how: str, used: bool) -> None:
    compiled, ids = kvpass.compile(tiny.llama(layers=1), **EAGER), tiny.tokens(1, 60)
    if used:
        generated(compiled, ids)
    assert held(generated(nest.COPIES[how](compiled), ids)) == BUDGET


def test_forward_has_the_models_signature() -> None:
    model = tiny.llama()
    compiled = kvpass.compile(model, **EAGER)
    assert isinstance(compiled, type(model))
    assert compiled.__class__ is type(model)
    with torch.no_grad():
        out = compiled.forward(tiny.tokens(1, 60), use_cache=True)
    assert held(cache_of(out)) == BUDGET


@pytest.mark.parametrize("fault", ["break inside", "uncompiled", "uncompiled core"])
def test_a_part_that_dynamo_does_not_see(fault: str) -> None:
    """Tuples of a first call may be anything; a cache that grows in the second is one."""
    model = nest.decoder()
    nest.FAULTS[fault](model.blocks[1])
    with pytest.raises(DeclinedError) as caught:
        nest.run(kvpass.compile(model, **EAGER), plain.tokens(1, 40), 2)
    assert "what to do: " in str(caught.value)


def test_a_layer_of_hf_that_dynamo_does_not_see() -> None:
    """HF's caches say at the first call what they are."""
    model = tiny.llama()
    layer = model.model.layers[1].self_attn
    layer.forward = torch._dynamo.disable(layer.forward)
    with pytest.raises(DeclinedError, match=r"layers\[1\]"), torch.no_grad():
        kvpass.compile(model, **EAGER)(tiny.tokens(1, 60), use_cache=True)


def test_a_layer_that_is_left_alone_later() -> None:
    """A compressed cache met by code that runs uncompiled is an error also where strict=False."""
    model = tiny.llama()
    compiled, ids = kvpass.compile(model, strict=False, **EAGER), tiny.tokens(1, 60)
    cache = prefilled(compiled, ids)
    layer = model.model.layers[1].self_attn
    layer.forward = torch._dynamo.disable(layer.forward)
    with pytest.raises(ShellDataError, match="uncompiled"), torch.no_grad():
        compiled(ids[:, :1], **with_cache(model, cache))


def test_nothing_is_compiled() -> None:
    model, ids = tiny.llama(), tiny.tokens(1, 60)
    compiled = kvpass.compile(model, **EAGER)
    cache = prefilled(compiled, ids)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with pytest.raises(DeclinedError, match="compiled no part"):
            compiled(ids, use_cache=True)
        with pytest.raises(RecompileError, match="uncompiled"):
            compiled(ids[:, :1], **with_cache(model, cache))


class Slotted:
    """A cache object without a `__dict__`."""

    __slots__ = ("cache",)

    def __init__(self) -> None:
        self.cache: Any = None


class SlottedDecoder(plain.Decoder):
    def forward(self, ids: torch.Tensor, kept: Slotted) -> torch.Tensor:  # type: ignore[override]  # it fills the cache
        x, kept.cache = super().forward(ids, kept.cache)
        return x


class NestedDecoder(plain.Decoder):
    """The cache lies six dicts deep."""

    def forward(self, ids: torch.Tensor, kept: Any = None) -> Any:
        inner = kept
        for _ in range(6 if kept is not None else 0):
            inner = inner["x"]
        x, inner = super().forward(ids, inner)
        for _ in range(6):
            inner = {"x": inner}
        return x, inner


@pytest.mark.parametrize("faulty", [True, False])
@pytest.mark.parametrize("kind", [plain.AttributeDecoder, SlottedDecoder, NestedDecoder])
def test_a_cache_wherever_it_is(kind: Any, faulty: bool) -> None:
    """In attributes of the model, in slots of an object, deep in containers: where a layer is not seen, that is said by
    the second call.
    """
    model = plain.make(kind)
    if faulty:
        hidden = torch._dynamo.disable(model.blocks[1].forward)
        model.blocks[1].forward = hidden  # type: ignore[method-assign]  # as a user hides one layer
    compiled, kept, ids = kvpass.compile(model, **EAGER), Slotted(), plain.tokens(1, 40)

    def run() -> Any:
        made: Any = None
        with torch.no_grad():
            for part in (ids, ids[:, :1], ids[:, 1:2]):
                given = {plain.AttributeDecoder: (), SlottedDecoder: (kept,), NestedDecoder: (made,)}[kind]
                result = compiled(part, *given)
                made = result[1] if kind is NestedDecoder else None
        return {SlottedDecoder: kept, NestedDecoder: made}.get(kind, compiled)

    if faulty:
        with pytest.raises(DeclinedError, match="a cache grew that kvpass did not compress"):
            run()
    else:
        assert len(kvpass.inspect(run()).layers) == 2


def test_nothing_is_compiled_of_a_model_that_keeps_its_cache() -> None:
    compiled = kvpass.compile(plain.make(plain.AttributeDecoder), **EAGER)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            with pytest.raises(DeclinedError, match="compiled no part"):
                compiled(plain.tokens(1, 40))


def test_what_only_looks_like_a_cache_that_grew() -> None:
    """Parts of a model, called alone, whose results are wider or longer than what they are given."""
    model = tiny.llama()
    compiled, ids = kvpass.compile(model, **EAGER), tiny.tokens(1, 60)
    with torch.no_grad():
        hidden = compiled.model(ids, use_cache=True)
        wide = compiled.lm_head(hidden.last_hidden_state)
        torch.testing.assert_close(wide, model.lm_head(hidden.last_hidden_state))
        assert held(cache_of(hidden)) == BUDGET
        cache = DynamicCache(config=model.config)
        x, angles = model.model.embed_tokens(ids), model.model.rotary_emb(hidden.last_hidden_state, ids[:, :1] * 0)
        for layer in compiled.model.layers:
            x = layer(x, position_embeddings=[t.expand(1, 60, -1) for t in angles], **with_cache(model, cache))
        assert held(cache) == BUDGET
        evicting = type(model).forward(compiled, ids, use_cache=True)
        assert held(cache_of(evicting)) == BUDGET


def test_the_model_itself_cannot_read_a_compressed_cache() -> None:
    model, ids = tiny.llama(), tiny.tokens(1, 60)
    cache = prefilled(kvpass.compile(model, **EAGER), ids)
    with pytest.raises(ShellDataError, match="cat reads"), torch.no_grad():
        model(ids[:, :1], **with_cache(model, cache))


def test_a_shell_answers_for_its_sizes_only() -> None:
    keys = prefilled(kvpass.compile(tiny.llama(), **EAGER), tiny.tokens(1, 60)).layers[0].keys
    assert (keys.shape[2], keys.dtype, keys.device.type) == (60, torch.float32, "cpu")
    assert keys[:, :, 7:].shape[2] == 53
    assert keys.to("cpu") is keys
    assert "compressed cache" in repr(keys)
    assert bool(keys.isnan().all())
    for read in (
        lambda: keys + 1,
        lambda: keys.clone(),
        lambda: keys.double(),
        lambda: keys[:, :, [0, 3]],
        keys.tolist,
    ):
        with pytest.raises(ShellDataError, match="as data"):
            read()


class Memory(plain.TupleBlock):
    """Learned keys and values stand in front of the cache."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.front = nn.Parameter(torch.randn(2, 1, self.kv_heads, 3, self.head_dim))

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (torch.cat([f.expand(len(q), -1, -1, -1), t], 2) for f, t in zip(self.front, (k, v), strict=True))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        mask = nn.functional.pad(plain.causal_mask(q.shape[2], k.shape[2] - 3 - q.shape[2]), (3, 0), value=True)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MemoryDecoder(plain.Decoder):
    block = Memory


class HiddenDecoder(plain.Decoder):
    """Caches hidden states, as Transformer-XL does, and makes keys and values of all of them at each call."""

    def forward(self, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        x, kept = self.embed(ids), []
        for i, block in enumerate(self.blocks):
            seen = x if cache is None else torch.cat([cache[i], x], 1)
            kept.append(seen)
            _, k, v = block.project(seen, 0)
            q = block.project(x, seen.shape[1] - x.shape[1])[0]
            x = block.finish(x, block.core(q, k, v))
        return self.head(x), tuple(kept)


@pytest.mark.filterwarnings("ignore::kvpass.errors.NothingRewritten")
def test_what_is_instead_of_a_cache() -> None:
    compiled = kvpass.compile(plain.make(HiddenDecoder), **EAGER)
    with pytest.raises(DeclinedError):
        nest.run(compiled, plain.tokens(1, 40), 2)


def test_what_is_beside_a_cache() -> None:
    compiled, model = kvpass.compile(plain.make(MemoryDecoder), "full", inner="eager"), plain.make(MemoryDecoder)
    caches: list[Any] = [None, None]
    for step, length in enumerate((40, 1, 1)):
        ids = plain.tokens(1, length)
        with torch.no_grad():
            got, caches[0] = compiled(ids, caches[0])
            expected, caches[1] = model(ids, caches[1])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=f"call {step}")
    assert all(graph.table.sites for graph in compiled.kvpass.graphs)


@pytest.mark.parametrize("family", ["bert", "mamba", "mistral"])
def test_nothing_to_rewrite_is_said_once(family: str) -> None:
    model = without_a_full_cache(family)
    compiled, ids = kvpass.compile(model, **EAGER), tiny.tokens(1, 20)
    with torch.no_grad(), pytest.warns(NothingRewritten, match=type(model).__name__):
        compiled(ids)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", NothingRewritten)
        compiled(ids)


def without_a_full_cache(family: str) -> Any:
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48}
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    if family == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=8)).eval()
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=16)
    return transformers.MistralForCausalLM(config).eval()


def test_state_in_attributes_is_the_compiled_models_own() -> None:
    """One model, two conversations: calls of either leave the other's cache alone."""
    model = plain.make(plain.AttributeDecoder)
    compiled, other = kvpass.compile(model, "full", inner="eager"), copy.deepcopy(model)
    a, b = plain.tokens(1, 30), plain.tokens(1, 30, seed=1)
    with torch.no_grad():
        model(b)
        for part in (a[:, :20], a[:, 20:21], a[:, 21:]):
            torch.testing.assert_close(compiled(part), other(part))
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(model(b[:, :1]), fresh(b[:, :1]))


def test_beams_and_speculation_by_their_names() -> None:
    ids, model = torch.cat([tiny.tokens(1, 20)] * 4, 1), tiny.llama()
    full, evicting = kvpass.compile(model, "full", inner="eager"), kvpass.compile(model, **EAGER)
    for name, asked, refusing in (
        ("multi-token prediction", {"use_mtp": True}, evicting),
        ("output_attentions", {"prompt_lookup_num_tokens": 4, "output_attentions": True}, evicting),
        ("paged", {"cache_implementation": "paged"}, evicting),
    ):
        with pytest.raises(kvpass.KVPassError, match=name):
            generated(refusing, ids, **asked)
    for asked in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        got, want = (generated(m, ids, **asked, only="sequences") for m in (full, model))
        torch.testing.assert_close(got, want)


def test_beams_over_an_evicting_cache() -> None:
    """Each beam goes on with the slots of the sequence that it was picked from."""
    compiled, ids = kvpass.compile(tiny.llama(), **EAGER), tiny.tokens(2, 60)
    cache = prefilled(compiled, ids)
    alone = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    step = tiny.tokens(2, 1, seed=5)
    with torch.no_grad():
        picked = compiled(step[[1, 1]], **with_cache(compiled, cache)).logits
        want = compiled(step, **with_cache(compiled, alone)).logits
    torch.testing.assert_close(picked, want[[1, 1]])


def prefilled(model: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return cache_of(model(ids, use_cache=True))


def generated(model: Any, ids: torch.Tensor, only: str = "", **more: Any) -> Any:
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **more}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return getattr(out, only) if only else cache_of(out)


def held(cache: Any) -> int:
    """Live slots of the fullest head; an error if a layer is dense."""
    kinds = {layer.keys.untyped_storage().nbytes() for layer in cache.layers}
    assert kinds == {4}
    return max(site["live_max"] for site in kvpass.report(cache).to_dict()["sites"])
