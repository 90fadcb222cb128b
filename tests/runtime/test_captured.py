"""Steps that are recorded once and replayed, with a stand-in for the device (`models.stand_in`)."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from contextvars import copy_context
from typing import Any

import pytest
import torch
from models import plain
from models.stand_in import StandIn, StandInPool, stand_in
from models.tiny import left_padded, one_llama, tokens
from spelling import INSTALLED
from torch import Tensor

import kvpass
from kvpass.errors import PolicyError
from kvpass.runtime.captured import GIVE_UP, LEAST_WIDTH, width_of
from kvpass.runtime.shell import find
from kvpass.runtime.store import LEAST_ROOM

pytestmark = pytest.mark.usefixtures("in_torch")

__all__ = ["stand_in"]

shared = pytest.mark.usefixtures("one_trace")


def compiled(model: Any, policy: Any = "h2o", mode: str = "reduce-overhead", **more: Any) -> Any:
    budget = None if policy == "full" else 0.3
    return kvpass.compile(model, policy, budget, inner=more.pop("inner", "eager"), mode=mode, **more)


def generated(model: Any, lengths: tuple[int, ...] = (30, 17), new: int = 40, **more: Any) -> Any:
    ids, mask = left_padded([*lengths])
    more |= {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, **more)


def counts(out: Any) -> dict[str, Any]:
    return kvpass.report(getattr(out, INSTALLED)).to_dict()["steps"]


def steps(model: Any, prompt: Tensor, count: int, cache: Any = None) -> tuple[list[Tensor], Any]:
    """Logits of a prompt and of so many tokens after it, by a plain decoder."""
    with torch.no_grad():
        logits, cache = model(prompt, cache)
        found = [logits[:, -1]]
        for _ in range(count):
            logits, cache = model(found[-1].argmax(-1, keepdim=True), cache)
            found.append(logits[:, -1])
    return found, cache


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@shared
@pytest.mark.parametrize("policy", ["full", "h2o", "streaming_llm", "tova", "corm", "lagkv", "ada_snapkv"])
@pytest.mark.some(4)
def test_generate_gives_the_same(policy: str, stand_in: StandIn) -> None:
    plain, recorded = (generated(compiled(one_llama(), policy, mode)) for mode in ("default", "reduce-overhead"))
    assert torch.equal(plain.sequences, recorded.sequences)
    found = counts(recorded)
    assert (found["captures"], found["replays"]) == (stand_in.recorded, stand_in.replayed)
    assert found["replays"] + found["eager"] == 39
    assert found["replays"] >= 30, found
    assert counts(plain) == {"captures": 0, "replays": 0, "eager": 0, "why": ""}
    one, other = (kvpass.inspect(getattr(out, INSTALLED)).layers for out in (plain, recorded))
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(one, other, strict=True))


@shared
def test_a_static_cache(stand_in: StandIn) -> None:
    """Its counters are changed in the graph, so they are no inputs to copy."""
    plain, recorded = (
        generated(compiled(one_llama(), mode=mode), cache_implementation="static")
        for mode in ("default", "reduce-overhead")
    )
    assert torch.equal(plain.sequences, recorded.sequences)
    assert counts(recorded)["replays"] >= 30, counts(recorded)


@shared
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inner_compilers(inner: str, stand_in: StandIn) -> None:
    prompt = plain.tokens(2, 20)
    wanted, _ = steps(compiled(plain.one(plain.Decoder), mode="default"), prompt, 12)
    found, cache = steps(compiled(plain.one(plain.Decoder), inner=inner), prompt, 12)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, found, strict=True))
    assert stand_in.replayed >= 8
    assert stand_in.replayed == find(cache[0][0]).steps.replays


@shared
def test_batches_and_turns_of_other_sizes_are_keyed(stand_in: StandIn) -> None:
    model, other = compiled(plain.one(plain.Decoder)), compiled(plain.one(plain.Decoder), mode="default")
    for batch, length in ((2, 20), (3, 20), (2, 50)):
        prompt = plain.tokens(batch, length)
        (wanted, old), (found, new) = steps(other, prompt, 8), steps(model, prompt, 8)
        assert equal(wanted, found)
        again = plain.tokens(batch, 5, seed=1)
        assert equal(steps(other, again, 8, old)[0], steps(model, again, 8, new)[0])
    assert stand_in.replayed >= 30
    assert stand_in.pools == 1, "one memory for all"


@shared
def test_a_clone_of_the_cache_goes_its_own_way(stand_in: StandIn) -> None:
    import copy

    model = compiled(plain.one(plain.Decoder))
    _, cache = steps(model, plain.tokens(2, 20), 6)
    branch = copy.deepcopy(cache)
    one, _ = steps(model, plain.tokens(2, 1), 6, cache)
    assert find(branch[0][0]).tokens == 26
    assert equal(one, steps(model, plain.tokens(2, 1), 6, branch)[0])


@shared
def test_outputs_outlive_the_next_step(stand_in: StandIn) -> None:
    found, _ = steps(compiled(plain.one(plain.Decoder)), plain.tokens(1, 20), 10)
    assert stand_in.replayed >= 5
    assert len({value.data_ptr() for value in found[-5:]}) == 5


@shared
def test_growth_is_recorded_seldom(stand_in: StandIn) -> None:
    """A full cache of 300 tokens: 32 slots at a time; columns of masks in powers of two."""
    _, cache = steps(compiled(plain.one(plain.Decoder), "full"), plain.tokens(1, 20), 280)
    made = find(cache[0][0]).steps
    assert made.captures <= 280 // LEAST_ROOM + 2
    assert made.replays >= 280 - 2 * (280 // LEAST_ROOM + 3)
    assert [width_of(at) for at in (0, 255, 256, 5000)] == [LEAST_WIDTH, 256, 512, 8192]


@shared
def test_few_recordings_are_kept(stand_in: StandIn) -> None:
    model = compiled(plain.one(plain.Decoder))
    held = [steps(model, plain.tokens(1, 20), 4)[1]]
    model.kvpass.recordings[0].most = 2
    held += [steps(model, plain.tokens(1, length), 4)[1] for length in (60, 100, 140)]
    assert len(model.kvpass.recordings[0].kept) == 2
    assert find(held[-1][0][0]).steps.replays > 0


@shared
def test_nothing_keeps_a_cache_alive(stand_in: StandIn) -> None:
    _, cache = steps(compiled(plain.one(plain.Decoder)), plain.tokens(1, 20), 8)
    assert stand_in.replayed > 0
    state = weakref.ref(find(cache[0][0]).state.k)
    del cache
    gc.collect()
    assert state() is None


def test_weights_changed_and_replaced(stand_in: StandIn) -> None:
    model, bare = plain.make(plain.Decoder), plain.make(plain.Decoder)
    recorded, wanted = compiled(model), compiled(bare, mode="default")
    (_, mine), (_, theirs) = (steps(one, plain.tokens(1, 20), 6) for one in (recorded, wanted))
    with torch.no_grad():
        for some in (model, bare):
            some.head.weight.mul_(-1.0)
    before = stand_in.recorded
    one, mine = steps(recorded, plain.tokens(1, 1), 1, mine)
    two, theirs = steps(wanted, plain.tokens(1, 1), 1, theirs)
    assert equal(one, two)
    assert stand_in.recorded == before, "the same addresses"
    for some in (model, bare):
        some.head.weight.data = some.head.weight.data.flip(0)
    one, mine = steps(recorded, plain.tokens(1, 1), 4, mine)
    two, theirs = steps(wanted, plain.tokens(1, 1), 4, theirs)
    assert equal(one, two)
    assert stand_in.recorded == before + 1, "other addresses"


@shared
def test_two_models_and_two_threads(stand_in: StandIn) -> None:
    models = [compiled(plain.one(kind)) for kind in (plain.Decoder, plain.GroupedDecoder)]
    prompts = [plain.tokens(1, 20, seed=seed) for seed in range(2)]
    wanted = {(m, p): steps(model, prompt, 12)[0] for m, model in enumerate(models) for p, prompt in enumerate(prompts)}
    found: dict[tuple[int, int], list[Tensor]] = {}

    def run(m: int, p: int) -> None:
        found[m, p] = steps(models[m], prompts[p], 12)[0]

    threads = [threading.Thread(target=copy_context().run, args=(run, *key)) for key in wanted]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert all(equal(wanted[key], found[key]) for key in wanted)


@shared
def test_out_of_memory(stand_in: StandIn) -> None:
    wanted, _ = steps(compiled(plain.one(plain.Decoder), mode="default"), plain.tokens(1, 20), 16)
    model = compiled(plain.one(plain.Decoder))
    stand_in.fails.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.warns(RuntimeWarning, match="memory was exhausted while a step was recorded"):
        found, cache = steps(model, plain.tokens(1, 20), 16)
    assert equal(wanted, found)
    made = find(cache[0][0]).steps
    assert made.captures > 0, "tried again"
    for _ in range(2):
        stand_in.fails.append(torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.warns(RuntimeWarning, match="memory was exhausted"):
            steps(model, plain.tokens(1, 20), 16)
    _, cache = steps(model, plain.tokens(1, 20), 16)
    assert find(cache[0][0]).steps == (0, 0, 16, "memory was exhausted while a step was recorded")


@shared
def test_what_cannot_be_recorded(stand_in: StandIn) -> None:
    wanted, _ = steps(compiled(plain.one(plain.Decoder), mode="default"), plain.tokens(1, 20), 6)
    stand_in.fails.append(RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"))
    found, cache = steps(compiled(plain.one(plain.Decoder)), plain.tokens(1, 20), 6)
    assert equal(wanted, found)
    made = find(cache[0][0]).steps
    assert made.eager == 6
    assert made.why == "it cannot be recorded: CUDA error: operation not permitted when stream is capturing"


class Fickle(plain.Decoder):
    """Is given another table at each call, which no step may take for the last one's."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        logits, grown = super().forward(ids, cache)
        return logits + self.extra, grown  # type: ignore[operator]  # a buffer


def test_buffers_that_move_are_copied(stand_in: StandIn) -> None:
    found = {}
    for mode in ("default", "reduce-overhead"):
        bare = plain.make(Fickle)
        bare.register_buffer("extra", torch.zeros(plain.VOCABULARY))
        model, cache, held = compiled(bare, mode=mode), None, []
        found[mode] = []
        with torch.no_grad():
            for at in range(14):
                held.append(bare.extra)
                bare.extra = torch.full((plain.VOCABULARY,), float(at))
                logits, cache = model(plain.tokens(1, 20 if at == 0 else 1, seed=at), cache)
                found[mode].append(logits[:, -1])
    assert equal(found["default"], found["reduce-overhead"])
    assert stand_in.replayed > 5


class Summing(plain.Decoder):
    """Reads the length of its cache in a way that no device can."""

    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        logits, grown = super().forward(ids, cache)
        past = 0 if cache is None else cache[0][0].shape[2]
        return logits * torch.ones(past + ids.shape[1]).sum(), grown


def test_a_graph_that_is_not_static(stand_in: StandIn) -> None:
    wanted, _ = steps(compiled(plain.make(Summing), mode="default"), plain.tokens(1, 20), 4)
    found, cache = steps(compiled(plain.make(Summing)), plain.tokens(1, 20), 4)
    assert equal(wanted, found)
    report = kvpass.report(cache)
    made = report.to_dict()["steps"]
    assert made["eager"] == 4
    assert made["why"].startswith("sum reads all columns of a tensor that grows")
    assert "steps: 0 replayed from 0 CUDA graphs, 4 eager (the last: sum reads" in str(report)


@shared
def test_addresses_that_never_come_back(stand_in: StandIn) -> None:
    """Caches that live for a step each: recording does not pay, and is given up."""
    model = compiled(plain.one(plain.Decoder))
    held = [steps(model, plain.tokens(1, 20, seed=seed), 2)[1] for seed in range(GIVE_UP + 3)]
    made = find(held[-1][0][0]).steps
    assert (made.replays, made.why) == (0, "sizes or addresses change from step to step")
    assert not model.kvpass.recordings[0].kept


@shared
def test_a_cpu_changes_nothing() -> None:
    prompt = plain.tokens(1, 20)
    wanted, _ = steps(compiled(plain.one(plain.Decoder), mode="default"), prompt, 4)
    found, cache = steps(compiled(plain.one(plain.Decoder)), prompt, 4)
    assert equal(wanted, found)
    assert find(cache[0][0]).steps == (0, 0, 4, "a cpu records no graphs")


@pytest.mark.parametrize(
    "options",
    [{"policy": "full", "inner": "eager", "mode": "reduce-overhead"}],
)
def test_torch_compile_takes_the_word(options: dict[str, Any], stand_in: StandIn) -> None:
    model = torch.compile(plain.make(plain.Decoder), backend="kvpass", options=options)
    _, cache = steps(model, plain.tokens(1, 30), 8)
    assert find(cache[0][0]).steps.replays == stand_in.replayed > 3


def test_torch_compile_hands_the_word_to_a_backend(stand_in: StandIn) -> None:
    model = torch.compile(
        plain.make(plain.Decoder), backend=kvpass.backend("h2o", 12, inner="eager"), mode="reduce-overhead"
    )
    steps(model, plain.tokens(2, 20), 6)
    assert stand_in.replayed > 0
    wrong = torch.compile(plain.make(plain.Decoder), backend=kvpass.backend("h2o", 12), mode="max-autotune")
    with pytest.raises(PolicyError, match="mode"):
        steps(wrong, plain.tokens(2, 20), 1)


def test_words() -> None:
    one, other = (kvpass.backend("h2o", 0.3, mode=mode) for mode in ("default", "reduce-overhead"))
    assert one != other
    assert pickle.loads(pickle.dumps(other)) == other
    with pytest.raises(PolicyError, match="no mode 'reduce-overheads'"):
        kvpass.compile(plain.make(plain.Decoder), mode="reduce-overheads")


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x.any())])
def test_the_stand_in_refuses_to_wait(wait: Any) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        StandInPool(StandIn()).record(lambda x: [wait(x)], [torch.ones(3)])


@shared
def test_one_llama_is_not_recorded_by_default(stand_in: StandIn) -> None:
    kvpass.compile(one_llama(), "h2o", 0.3, inner="eager").generate(tokens(1, 20), max_new_tokens=4, do_sample=False)
    assert stand_in.recorded == 0
