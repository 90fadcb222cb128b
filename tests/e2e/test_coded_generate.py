"""Models whose caches hold codes: tokens, positions and logits are the oracle's, and bytes what was asked for."""

from __future__ import annotations

import ast
import copy
import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.turns import GREEDY, beams
from oracle import codes
from oracle.chat import CLOSE, HEAD_DIM, CodedChat, gentle
from oracle.coded import CodedSimulator, Held
from oracle.drive import kept_positions
from oracle.hf import Oracle
from spelling import cache_of, with_cache
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache

import kvpass

BUDGETS: dict[str, Any] = {
    "full": 1.0,
    "h2o": 40,
    "snapkv": 48,
    "ada_snapkv": 48,
    "streaming_llm": 40,
    "layer_defensivekv": 48,
}


def spec(policy: str, store: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "mine", "extends": policy, "store": store, "min_slots": 40, **fields}


class Chat(CodedChat):
    def __init__(self, policy: str, held: Held, fields: dict[str, Any] | None = None, **options: Any) -> None:
        model, budget = gentle(), BUDGETS[policy]
        given = None if policy == "full" else budget
        compiled = kvpass.compile(model, spec(policy, held.spec, **(fields or {})), given, inner="eager", **options)
        simulator = CodedSimulator(policy, budget, 40, 2.0**-9, held=held)
        vars(simulator.policy).update(fields or {})
        super().__init__(compiled, Oracle(model, policy, budget, 40), simulator)
        self.held = held


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("policy", "name"),
    [*((policy, "int4") for policy in BUDGETS), *((p, n) for p in ("full", "h2o") for n in ("int8", "fp8_e4m3"))],
)
@pytest.mark.some(5)
def test_a_conversation(policy: str, name: str) -> None:
    chat = Chat(policy, Held(name, name, True, 64, 8, 3))
    chat.converse()
    assert chat.simulator.compared == 20 * 2 * 2 * 2
    chat.check()


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_halves_and_no_whole_tokens(policy: str) -> None:
    for held in (Held("int8", "int2", False, 5, 0, 0), Held("dense", "int4", True, 8, 0, 2)):
        chat = Chat(policy, held)
        chat.converse()
        chat.check()


@pytest.mark.usefixtures("one_trace")
def test_the_oracle_tells_what_is_held_otherwise() -> None:
    """A token more or less in full, and the conversation is another one."""
    held = Held("int4", "int4", True, 64, 8, 3)
    for other in (Held(), replace(held, residual=7), replace(held, sinks=2), replace(held, rotate=False)):
        chat = Chat("full", held)
        chat.simulator.held = other
        chat.converse()
        assert sum(gap > CLOSE for gap in chat.gaps) > 10


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["full", "h2o", "ada_snapkv"])
@pytest.mark.some(2)
def test_a_prompt_in_chunks(policy: str) -> None:
    """As `prefill_chunk_size` gives it: each chunk sees codes of those before."""
    chat = Chat(policy, Held("int4", "int4", True, 64, 8, 3))
    for chunk in tiny.tokens(2, 110).split(25, dim=1):
        token = chat.call(chunk)
    chat.decode(token, 4)
    chat.check()


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", ["h2o", "ada_snapkv"])
@pytest.mark.parametrize("fields", [{"every": 4}, {"when": "calls"}], ids=str)
def test_evictions_that_wait(policy: str, fields: dict[str, Any]) -> None:
    chat = Chat(policy, Held("int4", "int4", True, 64, 8, 3), fields)
    chat.converse()
    chat.check()


@pytest.mark.usefixtures("one_trace")
def test_layers_hold_what_they_say() -> None:
    """Codes in one layer, numbers in the other."""
    policy = spec("h2o", "int4", layers={"0": {"store": "dense"}})
    compiled = kvpass.compile(gentle(), policy, 40, inner="eager")
    cache = DynamicCache(config=gentle().config)
    with torch.no_grad():
        for length in (60, 1, 9, 1):
            compiled(tiny.tokens(2, length), **with_cache(compiled, cache), use_cache=True)
    first, second = kvpass.report(cache).to_dict()["sites"]
    assert first["bytes"] == 4 * first["slots"] * 2 * HEAD_DIM * 4
    assert second["bytes"] == 4 * (second["slots"] * 2 * (HEAD_DIM // 2 + 4) + 36 * 2 * HEAD_DIM * 4)


def test_beams_take_their_codes_along() -> None:
    """Eight bits, and the newest whole: the model's own sequences."""
    compiled = kvpass.compile(gentle(), {"store": {"k": "int8", "v": "int8", "residual": 6}}, inner="eager")
    assert torch.equal(beams(compiled, 10), beams(gentle(), 10))


def test_inductor_changes_nothing() -> None:
    model, (ids, mask) = tiny.llama(layers=1), tiny.left_padded([70, 45])
    outs = [
        kvpass.compile(model, spec("h2o", "int4"), 40, inner=inner).generate(
            ids, attention_mask=mask, max_new_tokens=8, **GREEDY
        )
        for inner in ("eager", "inductor")
    ]
    assert torch.equal(*[out.sequences for out in outs])
    ours, theirs = (kvpass.inspect(cache_of(out)).layers[0] for out in outs)
    assert torch.equal(ours.positions, theirs.positions)


@pytest.mark.usefixtures("one_trace")
def test_inference_mode_and_a_copy_made_in_it() -> None:
    compiled = kvpass.compile(gentle(), spec("ada_snapkv", "int8"), 48, inner="eager")
    cache = DynamicCache(config=gentle().config)
    with torch.inference_mode():
        for length in (60, 1, 9, 1):
            compiled(tiny.tokens(2, length), **with_cache(compiled, cache), use_cache=True)
        twin = copy.deepcopy(cache)
    with torch.no_grad():
        outs = [
            compiled(tiny.tokens(2, 1), **with_cache(compiled, one), use_cache=True).logits for one in (twin, cache)
        ]
    assert torch.equal(*outs)


def test_generate_takes_prompts_in_chunks() -> None:
    compiled = kvpass.compile(gentle(), spec("h2o", "int8"), 40, inner="eager")
    ids = tiny.tokens(2, 90)
    mask = torch.ones_like(ids)
    whole, parts = (
        compiled.generate(ids, attention_mask=mask, max_new_tokens=9, **GREEDY, **extra)
        for extra in ({}, {"prefill_chunk_size": 30})
    )
    for out in (whole, parts):
        assert out.sequences.shape == (2, 99)
        assert kept_positions(cache_of(out))[0].shape[2] == 40
    again = compiled.generate(whole.sequences, attention_mask=torch.ones(2, 99), max_new_tokens=5, **GREEDY,
                              **with_cache(compiled, cache_of(whole)))  # fmt: skip
    assert again.sequences.shape == (2, 104)
    assert kvpass.report(cache_of(again)).to_dict()["tokens"] == 103


@pytest.mark.usefixtures("one_trace")
def test_a_copy_goes_its_own_way() -> None:
    """A deep copy has codes and whole tokens of its own: both go on as one alone would."""
    chat = Chat("h2o", Held("int4", "int4", True, 64, 8, 3))
    token = chat.decode(chat.call(tiny.tokens(2, 60)), 5)
    twin, cache = copy.deepcopy(chat.cache), chat.cache
    other = tiny.tokens(2, 12, seed=5)
    with torch.no_grad():
        for one in other.split(1, dim=1):
            chat.model(one, **with_cache(chat.model, twin), use_cache=True)
    chat.decode(token, 6)
    chat.check()
    assert chat.cache is cache
    assert kvpass.report(twin).to_dict()["tokens"] == 60 + 5 + 12
    keys = [kvpass.inspect(one).layers[0].keys for one in (cache, twin)]
    assert not torch.equal(*keys)


@pytest.mark.parametrize("name", ["int4", "fp8_e4m3"])
@pytest.mark.some(1)
def test_static_caches_hold_codes_too(name: str) -> None:
    """The same tokens as from a growing cache, and fewer bytes than the buffers that the host made."""
    ids, mask = tiny.left_padded([80, 66])
    outs = [
        kvpass.compile(gentle(), spec("h2o", name), 40, inner="eager").generate(
            ids, attention_mask=mask, max_new_tokens=12, **GREEDY, **extra
        )
        for extra in ({"cache_implementation": "static"}, {})
    ]
    assert torch.equal(*[out.sequences for out in outs])
    ours, theirs = (kvpass.inspect(cache_of(out)).layers for out in outs)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("name", ["int8", "int8_symmetric"])
def test_eight_bits_of_everything_are_close_to_the_model(name: str) -> None:
    """All calls, verified by the library itself; the model's own logits are the yardstick."""
    model = gentle()
    compiled = kvpass.compile(model, {"store": name}, inner="eager", verify=True)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    gaps = []
    with torch.no_grad():
        for length in (60, 1, 1, 1, 20, 1, 1):
            ids = tiny.tokens(2, length, seed=length)
            ours = compiled(ids, **with_cache(compiled, caches[0]), use_cache=True).logits
            want = model(ids, **with_cache(model, caches[1]), use_cache=True).logits
            gaps.append(float((ours - want).abs().max() / want.abs().max()))
    assert gaps[0] < 1e-5, "a prompt is read in full"
    assert max(gaps) < 1e-2
    assert max(gaps) > 1e-5, "steps read codes"


@pytest.mark.usefixtures("one_trace")
def test_verify_passes_where_slots_go() -> None:
    for policy in ("h2o", "ada_snapkv"):
        chat = Chat(policy, Held("int4", "int4", True, 64, 8, 3), verify=True)
        chat.converse()
        chat.check()


@pytest.mark.usefixtures("one_trace")
def test_inspect_reads_codes() -> None:
    """Keys and values of the first layer, which hang on no attention: those of the model, through plain codes."""
    held = Held("int8", "int4", True, 16, 8, 3)
    model, (ids, mask) = gentle(), tiny.left_padded([70, 45])
    compiled = kvpass.compile(model, spec("h2o", held.spec), 40, inner="eager")
    cache, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for at in range(6):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            extra = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
            compiled(ids, **with_cache(compiled, cache), **extra)
            model(ids, **with_cache(model, dense), **extra)
            ids, mask = tiny.tokens(2, 1, seed=at), torch.cat([mask, mask.new_ones(2, 1)], 1)
    view = kvpass.inspect(cache).layers[0]
    tokens, firsts = 75, (0, 25)
    for got, name, made in ((view.keys, "int8", dense.layers[0].keys), (view.values, "int4", dense.layers[0].values)):
        assert got.dtype is torch.float32
        coded = codes.read_back(made, name, 16, rotate=True)
        for b, first in enumerate(firsts):
            for h in range(2):
                for at, position in enumerate(view.positions[b, h].tolist()):
                    whole = position >= tokens - 8 or position - first < 3
                    want = made[b, h, position].double() if whole else coded[b, h, position]
                    torch.testing.assert_close(got[b, h, at].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_trace")
def test_rewritten_graphs_are_read_as_python(tmp_path: Path) -> None:
    """The debug report of the three phases: each op on a line, codes among the state's tensors."""
    compiled = kvpass.compile(gentle(), spec("h2o", "int4"), 40, inner="eager", debug=str(tmp_path))
    cache = DynamicCache(config=gentle().config)
    with torch.no_grad():
        for length in (60, 1, 9):
            compiled(tiny.tokens(1, length), **with_cache(compiled, cache), use_cache=True)
    wanted = {
        "prefill": ["encode_slots", "prefill_attend", "compact_slots", "keep_whole"],
        "decode": ["decode_attend"],
        "extend": ["join_slots", "prefill_attend", "compact_slots", "keep_whole"],
    }
    for phase, ops in wanted.items():
        (folder,) = tmp_path.glob(f"graph_*_{phase}")
        text = (folder / "04_rewritten.py").read_text()
        function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
        assert isinstance(function.body[-1], ast.Return)
        called = re.findall(r"= torch\.ops\.kvpass\.(\w+)\.default\(", text)
        assert [called.count(op) for op in ops] == [2] * len(ops), phase
        assert "scaled_dot_product_attention(" not in re.sub("#.*", "", text)
        assert re.search(r'kvpass_0_k_codes: "u8\[\w+, 2, \w+, 8\]",  # kvpass: state of \S+, k_codes', text)
        assert "k_as=int4 v_as=int4" in (folder / "03_plan.txt").read_text()


HALF = {"k": "fp8_e4m3", "residual": 5, "sinks": 0, "group": 24}


def live() -> dict[int, Tensor]:
    """A tensor for every living storage."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not isinstance(t, FakeTensor)]
    return {t.untyped_storage()._cdata: t for t in tensors if not t.is_meta}


class Run:
    """A padded prompt and tokens through a model with heads of 64, and what memory that left behind."""

    def __init__(self, policy: Any, budget: Any, lengths: list[int]) -> None:
        model = gentle(64)
        self.model = kvpass.compile(model, policy, budget, inner="eager")
        ids, mask = tiny.left_padded(lengths)
        self.step(DynamicCache(config=model.config), ids, mask, 2)  # constants of the graphs are there from now on
        self.before = live()
        self.cache, self.ids, self.mask = DynamicCache(config=model.config), ids, mask

    def step(self, cache: Any, ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
        for _ in range(count):
            with torch.no_grad():
                out = self.model(ids, attention_mask=mask, **with_cache(self.model, cache), logits_to_keep=1)
            ids, mask = out.logits[:, -1].argmax(-1, keepdim=True), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return ids, mask

    def grow(self, count: int) -> dict[str, Any]:
        self.ids, self.mask = self.step(self.cache, self.ids, self.mask, count)
        data = kvpass.report(self.cache).to_dict()
        rows = [t for address, t in live().items() if address not in self.before]
        small = [t for t in rows if t is not self.ids and t is not self.mask]
        self.held = sum(t.untyped_storage().nbytes() for t in small)
        return data


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("policy", "store"),
    [
        ("full", "int8"),
        ("full", HALF),
        ("h2o", "int4"),
        ("ada_snapkv", "int8"),
        ("layer_defensivekv", "int4"),
        ("layer_defensivekv", HALF),
    ],
    ids=str,
)
@pytest.mark.some(3)
def test_reported_bytes_are_those_of_live_storage(policy: str, store: Any) -> None:
    """Counted from what each slot and each head must hold, and from every storage that is alive."""
    run = Run(spec(policy, store), None if policy == "full" else 48, [150, 120, 90])
    data = run.grow(8)
    heads, columns = 3 * 2, 6 if policy in ("ada_snapkv", "layer_defensivekv") else 4
    statistics = {"full": 0, "h2o": 1, "ada_snapkv": 2, "layer_defensivekv": 2}[policy]
    entries = {"int8": 2 * (64 + 4), "int4": 2 * (32 + 4)}.get(str(store), (64 + 3 * 2) + 64 * 4)
    whole, copied = (36, 2 * 64 * 4) if isinstance(store, str) else (5, 64 * 4)
    for site in data["sites"]:
        assert site["bytes"] == heads * (site["slots"] * entries + whole * copied)
        assert site["overhead_bytes"] == heads * (site["slots"] * (4 + 4 * statistics) + 4 * columns + 4 * whole)
        assert site["dense_bytes"] == heads * 157 * 2 * 64 * 4
    kept = 157 if policy == "full" else 48  # on average over the layers
    assert kept < sum(site["slots"] for site in data["sites"]) / 2 <= kept * 1.025 + 1
    ours = data["slot_bytes"] + data["overhead_bytes"]
    assert ours <= run.held <= ours + 4096


TEN: dict[str, Any] = {
    "h2o": "int4",
    "tova": "int8",
    "streaming_llm": "int4",
    "roco": "dense",
    "snapkv": "int8",
    "knorm": {"k": "int8", "v": "int4", "residual": 8},
    "keydiff": "int4_symmetric",
    "criticalkv": "fp8_e4m3",
    "ada_snapkv": "int8",
    "layer_defensivekv": "int8",
    "cake": {"k": "int8", "v": "int2", "group": 32},
}


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", TEN)
@pytest.mark.some(3)
def test_a_fifth_of_the_bytes(policy: str) -> None:
    """Four rows, padded, and 200 generated tokens: keys, values, scales, whole copies, positions, statistics and all
    are a fifth of what the unmodified cache holds.
    """
    run = Run(spec(policy, TEN[policy]), "20% bytes", [400, 380, 350, 300])
    data = run.grow(201)
    dense = 2 * 4 * 2 * 600 * 2 * 64 * 4
    assert data["dense_bytes"] == dense
    assert data["why"] == ""
    assert data["proof"]["evicted"] > 0
    ours = data["slot_bytes"] + data["overhead_bytes"]
    # where layers share, each row has the slots that its own tokens ask for, and padding has none
    tokens = (600 + 580 + 550 + 500) / 2400 if policy in ("layer_defensivekv", "cake") else 1
    assert 0.97 * 0.2 * tokens <= ours / dense <= 1.03 * 0.2
    assert ours <= run.held <= ours + 4096
