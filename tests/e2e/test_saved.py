"""Caches in files: what goes on from one goes on as if nothing had happened, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import plain, tiny
from models.turns import GREEDY
from oracle.chat import gentle
from spelling import with_cache
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvpass
from kvpass.api import saving
from kvpass.api.holdings import stores
from kvpass.errors import CacheError, KVPassError, StaleCacheError
from kvpass.runtime import saved
from kvpass.runtime.store import SlotStore

BUDGET = 48
POLICIES: dict[str, tuple[Any, int | None]] = {
    "h2o": ("h2o", BUDGET),
    "ragged": ("ada_snapkv", BUDGET),
    "shared by layers": ("layer_defensivekv", BUDGET),
    "codes": ({"name": "mine", "extends": "h2o", "store": "int4", "min_slots": 40}, BUDGET),
    "ragged codes": ({"name": "mine", "extends": "ada_snapkv", "store": "int4", "min_slots": 40}, BUDGET),
    "tiers": ({"name": "mine", "extends": "h2o", "evicted": {"to": "int2"}, "min_slots": 8}, BUDGET),
    "kivi": ("kivi", None),
    "turned": ({"name": "mine", "extends": "h2o", "positions": "reindexed"}, BUDGET),
    "every": ({"name": "mine", "extends": "h2o", "every": 8}, BUDGET),
}


def compiled(policy: str = "h2o", model: Any = None) -> Any:
    return kvpass.compile(model or gentle(), *POLICIES[policy], inner="eager")


def begun(model: Any) -> tuple[Any, Tensor]:
    """The cache of a padded prompt and five tokens, and its mask."""
    ids, mask = tiny.left_padded([90, 71])
    cache = DynamicCache(config=model.config)
    model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY, **with_cache(model, cache))
    return cache, torch.cat([mask, mask.new_ones(2, 5)], 1)


def logits(model: Any, cache: Any, mask: Tensor) -> Tensor:
    """Of tokens, a second turn of nine, and tokens."""
    found = []
    for at, count in enumerate((1, 1, 9, 1, 1)):
        mask = torch.cat([mask, mask.new_ones(2, count)], 1)
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -count:], "use_cache": True}
        with torch.no_grad():
            found.append(model(tiny.tokens(2, count, seed=at), **given, **with_cache(model, cache)).logits[:, -1])
    return torch.stack(found)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cache of two layers under h2o, for tests that read it."""
    path: Path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    kvpass.Cache(begun(compiled())[0]).save(path)
    return path


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.some(4)
def test_a_loaded_cache_goes_on(policy: str, tmp_path: Path) -> None:
    model = compiled(policy)
    cache, mask = begun(model)
    kvpass.Cache(cache).save(tmp_path / "a")
    other = compiled(policy)  # has not run yet: it knows none of its graphs
    again = kvpass.Cache.load(tmp_path / "a", other)
    assert isinstance(again.host, DynamicCache)
    for ours, theirs in zip(stores(again.host), stores(cache), strict=True):
        assert ours.rule == theirs.rule
        pairs = zip(ours.state.tensors(), theirs.state.tensors(), strict=True)
        assert all(a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs)
    assert kvpass.report(again.host).to_dict()["proof"] == kvpass.report(cache).to_dict()["proof"]
    assert torch.equal(logits(other, again, mask), logits(model, cache, mask))


@pytest.mark.usefixtures("one_trace")
def test_sizes_follow_the_live_bytes(tmp_path: Path) -> None:
    model = kvpass.compile(tiny.one_llama(4, 2, 64), "h2o", 400, inner="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.tokens(4, 600), **with_cache(model, cache), use_cache=True)
    kvpass.Cache(cache).save(tmp_path / "a")
    live = sum(int(store.live().sum()) for store in stores(cache)) * (2 * 64 * 4 + 4 + 4)
    assert 1 < (tmp_path / "a").stat().st_size / live < 1.05


class Mine(DynamicCache):
    """A caller's own."""


@pytest.mark.usefixtures("one_trace")
def test_what_cannot_be_saved_says_so(file: Path, tmp_path: Path) -> None:
    model = compiled()
    cache = kvpass.Cache.load(file, model).host
    path = tmp_path / "a"
    for host, told in (
        (Mine(config=model.config), "Mine"),
        ([cache, object()], "object"),
        (DynamicCache(config=model.config), "no compressed cache"),
        ((torch.nn.Parameter(torch.ones(1)), cache), "weights"),
    ):
        with pytest.raises(CacheError, match=told):
            saving.save(host, path)
    older = copy.copy(cache.layers[0])  # holds the shells of now
    mask = torch.cat([tiny.left_padded([90, 71])[1], torch.ones(2, 6, dtype=torch.long)], 1)
    with torch.no_grad():
        model(tiny.tokens(2, 1), attention_mask=mask, **with_cache(model, cache), use_cache=True)
    with pytest.raises(StaleCacheError, match="newest"):
        saving.save([older], path)
    stores(cache)[1].spoiled = True
    with pytest.raises(StaleCacheError, match="failed halfway"):
        kvpass.Cache(cache).save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_trace")
def test_a_loaded_cache_belongs_to_its_model(file: Path) -> None:
    """As any cache: refused by a model with other weights, later too."""
    cache = kvpass.Cache.load(file, compiled())
    other = compiled(model=tiny.one_llama())
    with pytest.raises(KVPassError, match="other weights"), torch.no_grad():
        other(tiny.tokens(2, 1), **with_cache(other, cache), use_cache=True)
    assert kvpass.report(cache.host).to_dict()["tokens"] == 95


SCRIPT = """
import sys
sys.path.insert(0, "examples")
sys.path.insert(0, "tests/models")
import tiny, torch, kvpass
from spelling import with_cache
model = kvpass.compile(tiny.llama(layers=1), "h2o", 48, inner="eager")
cache = kvpass.Cache.load(sys.argv[1], model)
ids = torch.tensor(eval(sys.argv[2]))
given = {"attention_mask": torch.ones_like(ids), **with_cache(model, cache)}
out = model.generate(ids, max_new_tokens=12, do_sample=False, **given)
print(out[0, ids.shape[1]:].tolist())
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    """The same tokens as without saving, on another hash seed."""
    model = kvpass.compile(tiny.llama(layers=1), "h2o", BUDGET, inner="eager")
    ids = tiny.tokens(1, 90)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **GREEDY)
    cache = kvpass.Cache(out)
    cache.save(tmp_path / "a")
    more = out.sequences
    want = model.generate(
        more, attention_mask=torch.ones_like(more), max_new_tokens=12, **GREEDY, **with_cache(model, cache)
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "a"), repr(more.tolist())],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == want.sequences[0, more.shape[1] :].tolist()


def test_tuples_and_preallocated_caches(tmp_path: Path) -> None:
    """Hosts of other kinds come back as what they were."""
    decoder = plain.make(plain.Decoder)
    model = kvpass.compile(decoder, "h2o", BUDGET, inner="eager")
    with torch.no_grad():
        _, cache = model(plain.tokens(2, 60))
        saving.save(cache, tmp_path / "a")
        again = saving.load(tmp_path / "a", model)
        assert type(again) is type(cache)
        assert type(again[0]) is type(cache[0])
        for step in range(3):
            (got, again), (want, cache) = (model(plain.tokens(2, 1, seed=step), one) for one in (again, cache))
            assert torch.equal(got, want)
    model, ids = kvpass.compile(tiny.llama(layers=1), "h2o", BUDGET, inner="eager"), tiny.tokens(1, 70)
    given = {"max_new_tokens": 8, **GREEDY}
    static = StaticCache(config=model.config, max_cache_len=128)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **with_cache(model, static))
    kvpass.Cache(static).save(tmp_path / "b")
    loaded = kvpass.Cache.load(tmp_path / "b", model)
    assert isinstance(loaded.host, StaticCache)
    more = out.sequences
    outs = [
        model.generate(more, attention_mask=torch.ones_like(more), **given, **with_cache(model, one)).sequences
        for one in (loaded, static)
    ]
    assert torch.equal(*outs)


def test_every_field_of_a_store_is_thought_of() -> None:
    words = (*saved.PLAIN, *saved.IN_OTHER_WORDS, *saved.OF_THE_PROCESS)
    assert sorted(words) == sorted(field.name for field in fields(SlotStore)), "say how a new field is saved"


def rewritten(file: Path, to: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """A copy of a file with other words or tensors, and sums that fit."""
    with safetensors.safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["kvpass"])
    tensors = safetensors.torch.load_file(file)
    change(said, tensors)
    said["sums"] = {name: saving._sum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(said)
    safetensors.torch.save_file(tensors, to, {"kvpass": text, "kvpass.crc32": str(saving.zlib.crc32(text.encode()))})
    return to


def _narrower(said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["1.v"] = tensors["1.v"][:, :, :-1].contiguous()


def _of_another_dtype(said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["0.pos"] = tensors["0.pos"].long()


def _beyond(said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["0.cursor"][0, 0, 0] = 4096


def _a_class_of_others(said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    said["host"] = {"object": "os", "has": {}}


FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "a tensor is missing": (lambda said, tensors: tensors.pop("1.k"), "lacks k"),
    "a wrong shape": (_narrower, "has v of"),
    "a wrong dtype": (_of_another_dtype, "has pos of torch.int64"),
    "slots that are not there": (_beyond, "that it does not have"),
    "a word is missing": (lambda said, tensors: said["stores"][0].pop("tokens"), "tokens"),
    "an unknown word of a rule": (lambda said, tensors: said["stores"][0].update(rule="ops=3 what=1"), "what"),
    "slots of another layout": (lambda said, tensors: said["stores"][0].update(rule="ops=1"), "ops=1"),
    "a class of no cache": (_a_class_of_others, "'os'|os"),
    "another format": (lambda said, tensors: said.update(format=2), "format: 2"),
    "another kvpass": (lambda said, tensors: said.update(kvpass="0.0.1"), "version of kvpass: 0.0.1"),
    "another transformers": (lambda said, tensors: said.update(transformers="4.1"), "version of transformers: 4.1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str, file: Path, tmp_path: Path) -> None:
    change, told = FAULTS[fault]
    changed = rewritten(file, tmp_path / "changed", change)
    with pytest.raises(CacheError, match=told) as caught:
        kvpass.Cache.load(changed, compiled())
    assert caught.value.where == str(changed)
    assert caught.value.hint


def test_another_torch_is_taken(file: Path, tmp_path: Path) -> None:
    changed = rewritten(file, tmp_path / "changed", lambda said, tensors: said.update(torch="2.99"))
    assert kvpass.Cache.load(changed, compiled()).tokens == 95


def test_another_policy_budget_or_model(file: Path) -> None:
    other = copy.deepcopy(gentle())
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for model, told in (
        (kvpass.compile(gentle(), "tova", BUDGET, inner="eager"), "policy tova, budget 48"),
        (kvpass.compile(gentle(), "h2o", 40, inner="eager"), "budget 40"),
        (kvpass.compile(gentle(), {"extends": "h2o", "name": "h2o", "min_slots": 9}, BUDGET), "other fields differ"),
        (compiled(model=tiny.llama()), "other weights"),
        (compiled(model=other), "lm_head"),
        (compiled(model=copy.deepcopy(gentle()).bfloat16()), "other weights"),
    ):
        with pytest.raises(StaleCacheError, match=told) as caught:
            kvpass.Cache.load(file, model)
        assert caught.value.hint
    with pytest.raises(CacheError, match=r"kvpass\.compile"):
        kvpass.Cache.load(file, gentle())
    same = kvpass.Cache.load(file, compiled(model=copy.deepcopy(gentle())))  # equal in content
    assert same.tokens == 95


def test_truncated_and_changed_files(file: Path, tmp_path: Path) -> None:
    """Wherever a file ends, and whichever byte is another one."""
    data, bad, model = file.read_bytes(), tmp_path / "bad", compiled()
    broken = [data[:cut] for cut in (0, 5, 8, 300, len(data) // 2, len(data) - 1)]
    for at in (3, 9, 200, 3000, len(data) // 2, len(data) - 9):
        broken += [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]]
    for one in (*broken, b"no cache at all", b"PK" + data):
        bad.write_bytes(one)
        with pytest.raises(CacheError, match=r"damaged|holds no cache|another"):
            kvpass.Cache.load(bad, model)
    safetensors.torch.save_file({"weight": torch.ones(2)}, bad)
    with pytest.raises(CacheError, match="holds no cache of kvpass"):
        kvpass.Cache.load(bad, model)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CacheError, match=r"cannot be read|damaged"):
            kvpass.Cache.load(missing, model)


def test_a_full_disk_leaves_what_was_there(file: Path, tmp_path: Path) -> None:
    cache = kvpass.Cache.load(file, compiled())
    path = tmp_path / "a"
    path.write_bytes(b"older")
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(CacheError, match="could not be written") as caught:
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "untouched" in caught.value.hint
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"older"
    cache.save(path)
    assert kvpass.Cache.load(path, compiled()).tokens == cache.tokens
    with pytest.raises(CacheError, match="could not be written"):
        cache.save(tmp_path / "no" / "such" / "folder")
