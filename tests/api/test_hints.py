"""Errors name the true cause: what was given to kvpass, and what is valid. Following each hint works."""

from __future__ import annotations

import contextlib
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import plain

import kvpass
from kvpass.errors import CacheError, DeclinedError, KVPassError, ModelError, PolicyError, TrainingError
from kvpass.policy.policy import Policy

MODEL = plain.make(plain.Decoder)
E: dict[str, Any] = {"inner": "eager"}


def a_function(ids: torch.Tensor) -> torch.Tensor:
    return ids


class Pipeline:
    """Holds a model as transformers' pipelines do."""

    model = MODEL

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return ids


def training() -> torch.nn.Module:
    return plain.make(plain.Decoder).train()


ARGUMENTS: list[tuple[Any, dict[str, Any], type[KVPassError], str, str]] = [
    (None, {}, ModelError, "not None", "from_pretrained"),
    ("model", {}, ModelError, "not 'model' (str)", "from_pretrained('model')"),
    (Path("/m"), {}, ModelError, "not a PosixPath", "from_pretrained('/m')"),
    (a_function, {}, ModelError, "not the function a_function", "backend=kvpass.backend(..)"),
    (plain.Decoder, {}, ModelError, "not the class Decoder", "Decoder(..).eval()"),
    (Pipeline(), {}, ModelError, "not a Pipeline", "x.model = kvpass.compile(x.model"),
    (MODEL.state_dict(), {}, ModelError, "not a OrderedDict", "give a model"),
    (MODEL, {"strict": "no"}, PolicyError, "'no' (str) in 'strict'", "True or False"),
    (MODEL, {"strict": None}, PolicyError, "None in 'strict'", "True or False"),
    (MODEL, {"verify": "yes"}, PolicyError, "'yes' (str) in 'verify'", "True or False"),
    (MODEL, {"debug": 3}, PolicyError, "3 (int) in 'debug'", "a folder"),
    (MODEL, {"inner": None}, PolicyError, "no inner compiler None", "inductor, aot_eager, eager"),
    (MODEL, {"inner": "Inductor"}, PolicyError, "no inner compiler 'Inductor'", "did you mean 'inductor'"),
    (MODEL, {"patterns": []}, PolicyError, "no pattern set", "DEFAULT.extended"),
    (MODEL, {"budget": True}, PolicyError, "not bool", "budget=0.2"),
    (MODEL, {"budget": "0.2"}, PolicyError, "not str", "without quotes"),
    (MODEL, {"budget": float("nan")}, PolicyError, "above 0 and at most at 1.0", "0.2"),
    (MODEL, {"budget": float("inf")}, PolicyError, "above 0 and at most at 1.0", "give an int"),
    (MODEL, {"budget": 100.0}, PolicyError, "above 0 and at most at 1.0", "give an int, e.g. 100"),
    (MODEL, {"budget": torch.tensor(0.2)}, PolicyError, "not Tensor", "budget.item()"),
    (MODEL, {"budget": [0.2]}, PolicyError, "not list", "budget=0.2"),
    (training(), {}, TrainingError, "in train mode (Decoder.training is True)", "model.eval()"),
]


@pytest.mark.parametrize(("model", "options", "kind", "what", "fix"), ARGUMENTS, ids=[row[3] for row in ARGUMENTS])
def test_arguments_are_checked_at_once(model: Any, options: Any, kind: Any, what: str, fix: str) -> None:
    with pytest.raises(kind) as caught:
        kvpass.compile(model, "h2o", **{"budget": 40, **options})
    assert what in caught.value.what
    assert fix in caught.value.hint
    assert caught.value.where
    if kind is PolicyError:
        with pytest.raises(PolicyError, match="what to do"):
            kvpass.backend("h2o", **{"budget": 40, **options})


@pytest.mark.parametrize("budget", [np.float64(0.2), np.float32(0.2), np.int64(40), np.int32(40)], ids=repr)
def test_numbers_of_numpy_are_numbers(budget: Any) -> None:
    own = budget.item()
    chosen = Policy.load("h2o").with_budget(budget)
    assert chosen == Policy.load("h2o").with_budget(own)
    assert type(chosen.budget) is type(own)
    assert Policy.load({"name": "mine", "extends": "h2o", "budget": budget}).budget == own


def test_explain_and_rewrite_check_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not None"):
        kvpass.explain(None, plain.tokens(1, 4))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(PolicyError, match="a budget, but no policy"):
        kvpass.explain(MODEL, plain.tokens(1, 4), budget=0.2)
    with pytest.raises(ModelError, match=r"not a Decoder(.|\n)*torch.export.export(.|\n)*kvpass.compile"):
        kvpass.rewrite(MODEL, "h2o", 40)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="'strict'"):
        kvpass.rewrite(torch.fx.symbolic_trace(torch.nn.Identity()), "h2o", 40, strict="no")  # type: ignore[arg-type]
    assert kvpass.backend("h2o", 40, debug=tmp_path).debug == str(tmp_path)


def test_hooks_of_accelerate_are_named_and_removed() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model = plain.make(plain.Decoder)
    for block in model.blocks:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ModelError, match=r"hooks on 'blocks.0' and 1 more modules \(AlignDevicesHook\)") as caught:
        kvpass.compile(model, "h2o", 40, **E)
    assert "remove_hook_from_submodules" in caught.value.hint
    remove_hook_from_submodules(model)
    assert kvpass.compile(model, "h2o", 40, **E) is not None


class AskedBlock(plain.TupleBlock):
    """Attention written out, whose weights the caller may have."""

    def forward(self, x: torch.Tensor, cache: Any, asked: Any = None) -> Any:
        q, k, v = self.project(x, 0 if cache is None else cache[0].shape[2])
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        hidden = ~plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
        wide_k, wide_v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        weights = (q @ wide_k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        if asked is not None:
            asked.append(weights)
        return self.finish(x, weights @ wide_v), (k, v)


class Asked(plain.Decoder):
    """Returns the weights of its attention, as output_attentions=True does."""

    block = AskedBlock

    def forward(self, ids: torch.Tensor, cache: Any = None, output_attentions: bool = False) -> Any:
        x, grown, weights = self.embed(ids), [], [] if output_attentions else None
        for at, block in enumerate(self.blocks):
            x, pair = block(x, None if cache is None else cache[at], weights)
            grown.append(pair)
        return self.head(x), tuple(grown), weights


def test_attention_weights_that_are_asked_for() -> None:
    model = kvpass.compile(plain.make(Asked), "h2o", 40, **E)
    with torch.no_grad():
        with pytest.raises(DeclinedError, match="attention weights are asked for") as caught:
            model(plain.tokens(1, 60), None, output_attentions=True)
        assert "call without output_attentions=True" in caught.value.hint
        _, cache, _ = model(plain.tokens(1, 60), None)
    assert kvpass.report(cache).to_dict()["sites"][0]["live_max"] == 40


def test_a_compressed_cache_is_copied_and_pickled() -> None:
    import copy

    model = kvpass.compile(MODEL, "h2o", 40, **E)
    with torch.no_grad():
        _, cache = model(plain.tokens(1, 60), None)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        others = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(file, weights_only=False)
        want, *found = (model(plain.tokens(1, 1), one)[0] for one in (cache, *others))
    assert all(torch.equal(one, want) for one in found)


def test_dynamic_shapes_leave_numbers_constant() -> None:
    """torch.compile(dynamic=True) makes a model's own floats symbolic too, its attention's scale among them."""

    class Scaled(plain.TupleBlock):
        scale = 0.25

        def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = plain.causal_mask(q.shape[2], k.shape[2] - q.shape[2])
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    logits = []
    for dynamic in (None, True):
        model = plain.make(plain.Decoder)
        for block in model.blocks:
            block.__class__ = Scaled
            block.scale = 0.25
        compiled = torch.compile(model, backend=kvpass.backend("h2o", 40, **E), dynamic=dynamic)
        with torch.no_grad():
            _, cache = compiled(plain.tokens(1, 60), None)
            out, cache = compiled(plain.tokens(1, 1), cache)
        assert kvpass.report(cache).to_dict()["sites"][1]["live_max"] == 40
        logits.append(out)
        torch._dynamo.reset()
    torch.testing.assert_close(logits[0], logits[1])


# marks

KEEP = torch.zeros(1, 60, dtype=torch.bool)
KEEP[0, [5, 11, 12]] = True
MARKED = {"name": "marked", "extends": "h2o", "protect": {"tokens": True}}


@pytest.mark.parametrize(
    ("marks", "what", "fix"),
    [
        ({}, "marks of shapes that do not fit: nothing", "batch, tokens"),
        ({"keep": [[]]}, "keep= is empty", "batch, tokens"),
        ({"keep": KEEP[0]}, "do not fit: keep [60]", "batch, tokens"),
        ({"keep": KEEP, "spans": [[1, 2]]}, "do not fit: keep [1, 60], spans [1, 2]", "batch, tokens"),
        ({"keep": KEEP.float()}, "keep= is of dtype float32", "keep.bool()"),
        ({"drop": np.zeros((1, 4))}, "drop= is of dtype float64", "drop.bool()"),
        ({"spans": KEEP}, "spans= is of dtype bool", "spans.long()"),
        ({"keep": [[5, 11, 12]]}, "numbers from 5 to 12", "by their position"),
        ({"spans": [[0, -1]]}, "numbered from 0, not -1 to 0", "from 0 to"),
        ({"keep": [[True], [True, False]]}, "no table of marks", "nested lists"),
        ({"keep": "yes"}, "no table of marks", "nested lists"),
        ({"keep": [[1, 0]], "drop": [[1, 0]]}, "kept and dropped", "different tokens"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_marks_are_checked_at_once(marks: Any, what: str, fix: str) -> None:
    with pytest.raises(CacheError) as caught, kvpass.marked(**marks):
        pass
    assert what in caught.value.what
    assert fix in caught.value.hint


@pytest.fixture(scope="module")
def compiled() -> Any:
    return kvpass.compile(MODEL, MARKED, 40, **E)


def kept(model: Any, seed: int = 0) -> set[int]:
    """Positions that every head of every layer holds after a prompt of 60."""
    with torch.no_grad():
        _, cache = model(plain.tokens(1, 60, seed), None)
    heads = [head for layer in kvpass.inspect(cache).layers for head in layer.positions[0].tolist()]
    return set.intersection(*map(set, heads))


@pytest.mark.parametrize("given", [KEEP, KEEP.long(), KEEP.tolist(), KEEP.numpy(), [KEEP[0].tolist()]], ids=type)
def test_marks_are_what_torch_takes(compiled: Any, given: Any) -> None:
    with kvpass.marked(keep=given):
        assert {5, 11, 12} <= kept(compiled)


READS = {"h2o": (), "whitelist": ("keep", "drop"), "judge_q": ("keep", "drop"), "fair": ("keep", "spans", "drop")}


@pytest.mark.parametrize("policy", READS)
def test_what_a_policy_reads_of_marks(policy: str) -> None:
    assert Policy.load(policy).with_budget(40).marks == READS[policy]
    assert Policy.load("whitelist").with_budget(1.0).marks == ("keep",)
    layered = {"name": "mine", "extends": "h2o", "layers": {"0": {"protect": {"tokens": True}}}}
    assert Policy.load(layered).with_budget(40).marks == ("keep", "drop")


def test_marks_that_nothing_reads_are_refused(compiled: Any) -> None:
    plainly = kvpass.compile(MODEL, "h2o", 40, **E)
    with torch.no_grad():
        for model, word in ((plainly, "keep"), (plainly, "drop"), (compiled, "spans")):
            theirs = "reads no marks" if model is plainly else "reads keep and drop only"
            with (
                pytest.raises(CacheError, match=rf"kvpass.marked\({word}=..\) .*{theirs}") as caught,
                kvpass.marked(**{word: KEEP.long()}),
            ):
                model(plain.tokens(1, 60), None)
            assert "choose a policy with" in caught.value.hint
        with kvpass.marked(keep=KEEP):
            _, cache = compiled(plain.tokens(1, 60), None)
        _, cache = compiled(plain.tokens(1, 1), cache)
        with pytest.raises(CacheError, match="comes alone"), kvpass.marked(drop=torch.ones(1, 99).bool()):
            compiled(plain.tokens(1, 1), cache)


def test_marks_without_a_call_are_said() -> None:
    with pytest.warns(UserWarning, match="no compiled model was called"), kvpass.marked(keep=KEEP):
        pass


def in_thread(work: Any) -> Any:
    """What `work` gives in a thread that starts now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_thread_started_inside_has_the_marks(compiled: Any) -> None:
    """Also one that a thread started, and one whose starter has left the block."""
    with kvpass.marked(keep=KEEP):
        assert {5, 11, 12} <= in_thread(lambda: kept(compiled))
        assert {5, 11, 12} <= in_thread(lambda: in_thread(lambda: kept(compiled)))
        go, found = threading.Event(), []
        late = threading.Thread(target=lambda: go.wait(60) and found.append(kept(compiled)))
        late.start()
    go.set()
    late.join()
    assert {5, 11, 12} <= found[0]
    assert not {5, 11, 12} <= in_thread(lambda: kept(compiled))


def test_threads_with_blocks_of_their_own(compiled: Any) -> None:
    """Each has its own marks, and one without a block has none, while all are open."""
    open_ = threading.Barrier(3, timeout=60)

    def work(at: int) -> set[int]:
        mark = torch.zeros(1, 60, dtype=torch.long)
        mark[0, at] = 1
        with kvpass.marked(keep=mark) if at else contextlib.nullcontext():
            open_.wait()
            found = kept(compiled)
            open_.wait()
        return found

    alone = kept(compiled)
    with ThreadPoolExecutor(3) as pool:
        one, two, none = pool.map(work, (21, 22, 0))
    assert none == alone
    assert ({21, 22} & one, {21, 22} & two) == ({21} | {21, 22} & one & alone, {22} | {21, 22} & two & alone)


def test_a_thread_that_was_there_before(compiled: Any) -> None:
    """It cannot know the marks: their block ends with an error, not in silence."""
    with ThreadPoolExecutor(1, "worker") as pool:
        pool.submit(int).result()
        with pytest.raises(CacheError, match="thread 'worker_0' called the model") as caught, kvpass.marked(keep=KEEP):
            pool.submit(kept, compiled).result()
        assert "inside of the function that the thread runs" in caught.value.hint

        def marking() -> set[int]:
            with kvpass.marked(keep=KEEP):
                return kept(compiled)

        assert {5, 11, 12} <= pool.submit(marking).result()


def test_a_pool_that_outlives_the_block(compiled: Any) -> None:
    with ThreadPoolExecutor(1, "worker") as pool:
        with kvpass.marked(keep=KEEP):
            assert {5, 11, 12} <= pool.submit(kept, compiled).result()
        with pytest.raises(CacheError, match="started inside of a block"):
            pool.submit(kept, compiled).result()
