"""The later policies keep the same positions as the oracle, after every call, in every layer and head."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import tiny
from oracle.base import Policy
from oracle.drive import Conversation
from oracle.held import LagKV
from oracle.needs import CORM, FastGen, NoneGoodEnough, SimLayerKV
from oracle.ops import Layers
from oracle.policies import NEW, POLICIES, AdaPyramid, AdaSnapKV, CriticalAda, PyramidKV
from oracle.windowed import DefensiveKV, LayerDefensiveKV

NEAR_TIES = 0.005
"""Largest share of comparisons in which the library may have broken a near-tie otherwise than float64
(test_kept_positions.py says why)."""

SHAPES = [(4, 4), (6, 2), (8, 2)]  # query and KV heads: groups of 1, 3, 4

BUDGETS = {"vatp": 64, "nacl": 80, "criticalkv": 96, "critical_ada": 96, "pyramidkv": 64, "ada_pyramid": 64}
"""Where 48 slots leave nothing to choose, beside what is protected."""

VOCABULARY = 1024


@functools.cache
def model(heads: int, kv_heads: int, layers: int = 2) -> Any:
    """With so many words that none comes twice: keys of the same word have the same length, which is a tie."""
    made = tiny.llama(heads, kv_heads, layers=layers)
    made.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    torch.nn.init.normal_(made.get_input_embeddings().weight, std=0.2)
    return made


class Words:
    """Each row's tokens, none of them twice."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(4)
        self.rows = torch.stack([torch.randperm(VOCABULARY - 1, generator=generator) + 1 for _ in range(rows)])
        self.used = 0

    def __call__(self, count: int) -> torch.Tensor:
        self.used += count
        return self.rows[:, self.used - count : self.used]


def converse(conversation: Conversation, turns: list[tuple[int, int]], lengths: list[int]) -> None:
    """Turns of so many tokens at once, then so many one by one; the first one's rows are padded on the left."""
    words = Words(len(lengths))
    for turn, (together, alone) in enumerate(turns):
        mask = None
        if turn == 0:
            mask = torch.stack([torch.arange(together) >= together - n for n in lengths]).long()
        ids = words(together)
        conversation.call(ids if mask is None else ids * mask, mask)
        for _ in range(alone):
            conversation.call(words(1))


def finish(conversation: Conversation | Layers, capsys: pytest.CaptureFixture[str], calls: int) -> None:
    s = conversation.simulator
    assert s.compared == calls * sum(len(layer.heads) * len(layer.heads[0]) for layer in s.layers.values())
    with capsys.disabled():
        print(f"\n  near-ties followed: {s.near_ties} of {s.compared}", *s.followed[:3], sep="\n    ")
    assert s.near_ties <= NEAR_TIES * s.compared


COMPILED = [
    "knorm",
    "vatp",
    "r_kv",
    "cake",
    "criticalkv",
    "ada_pyramid",
    "defensivekv",
    "layer_defensivekv",
    "streaming_llm_reindexed",
    "finch",
]
"""One for each way in which ops are joined in a graph; `test_ops` has them all."""


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("policy", COMPILED)
def test_conversation(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of 150 and 110 tokens, 40 single ones, a second turn of 60, 3 single ones."""
    conversation = Conversation(model(6, 2), policy, BUDGETS.get(policy, 48), inner="eager")
    converse(conversation, [(150, 40), (60, 3)], [150, 110])
    finish(conversation, capsys, 45)


ONE_SHAPE = [(policy, SHAPES[i % 3]) for i, policy in enumerate(NEW)]
OTHERS = [(policy, shape) for policy in NEW for shape in SHAPES if (policy, shape) not in ONE_SHAPE]


@pytest.mark.parametrize(
    ("policy", "shape"), [*ONE_SHAPE, *(pytest.param(*other, marks=pytest.mark.wide) for other in OTHERS)]
)
def test_ops(policy: str, shape: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """The same without a model, for every group size; a third of the policies for each, the rest in `make wide`."""
    layers = Layers(policy, BUDGETS.get(policy, 48), shape)
    layers.converse([(150, 40), (60, 3)], [150, 110])
    finish(layers, capsys, 45)


class ShortLag(LagKV):
    lag = 16


class Safe(AdaSnapKV):
    safeguard = Fraction(9, 10)


class SafeCritical(CriticalAda):
    safeguard = Fraction(3, 4)


class Deep(AdaPyramid):
    beta = 4


class ModelWide(AdaSnapKV):
    spread = "model"
    safeguard = Fraction(1, 10)


class ShortMemory(CORM):
    cut, recent = -2, 3


class MostlyLazy(SimLayerKV):
    recent, most = 16, 0.14


class SmallSets(FastGen):
    recovered, hitters, recent = 0.75, 0.4, 0.1


class SmallNucleus(LayerDefensiveKV):
    nucleus = 0.2


CORM_SPEC = {"extends": "corm", "allocate": {"threshold": -2}, "protect": {"recent": 3}}
LAZY_SPEC = {"extends": "simlayerkv", "options": {"recent": 16, "most": 0.14}, "protect": {"recent": 16}}
FASTGEN_SPEC = {"extends": "fastgen", "options": {"least": 0.75, "hitters": 0.4, "recent": 0.1}}

VARIANTS: list[tuple[str, dict[str, Any], int | float, Policy]] = [
    ("blocks of 16", {"extends": "lagkv", "options": {"block": 16}}, 48, ShortLag()),
    ("safeguard", {"extends": "ada_snapkv", "allocate": {"heads": "flat", "safeguard": 0.9}}, 48, Safe()),
    ("both stages", {"extends": "critical_ada", "allocate": {"heads": "flat", "safeguard": 0.75}}, 80, SafeCritical()),
    ("a steep pyramid", {"extends": "ada_pyramid", "allocate": {"layers": "pyramid", "beta": 4}}, 56, Deep()),
    ("a share of the tokens", {"extends": "defensivekv"}, 0.5, DefensiveKV()),
    ("the model's best", {"extends": "snapkv", "allocate": {"layers": "flat", "safeguard": 0.1}}, 48, ModelWide()),
    ("a small nucleus", {"extends": "layer_defensivekv", "options": {"nucleus": 0.2}}, 48, SmallNucleus()),
    ("a short memory", CORM_SPEC, 1.0, ShortMemory()),
    ("none is good enough", {"score": "knorm", "allocate": {"heads": "threshold"}}, 1.0, NoneGoodEnough()),
    ("and a bound", CORM_SPEC, 64, ShortMemory()),
    ("lazy layers", LAZY_SPEC, 1.0, MostlyLazy()),
    ("lazy layers and a bound", LAZY_SPEC, 100, MostlyLazy()),
    ("small sets", FASTGEN_SPEC, 1.0, SmallSets()),
    ("small sets and a bound", FASTGEN_SPEC, 64, SmallSets()),
    ("a share of a pyramid", {"extends": "pyramidkv"}, 0.4, PyramidKV()),
]


@pytest.mark.parametrize(("what", "policy", "budget", "meaning"), VARIANTS, ids=[v[0] for v in VARIANTS])
def test_variants(
    what: str, policy: dict[str, Any], budget: int | float, meaning: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the presets' numbers leave idle at this size: blocks, safe slots, steps between layers, growing budgets."""
    layers = Layers({"name": "variant", **policy}, budget, (6, 2), layers=3, meaning=meaning)
    layers.converse([(150, 40), (60, 3), (9, 12)], [150, 110])
    finish(layers, capsys, 58)
    if meaning.spread == "model":
        totals = {sum(len(head.positions) for head in layer.heads[0]) for layer in layers.simulator.layers.values()}
        assert len(totals) > 1, "the layers share nothing out"


MUTATIONS: list[tuple[str, str, Any]] = [
    ("vatp", "weigh", lambda self, sight: (sight.values[sight.head] ** 2).sum(-1)),
    ("knorm", "recent", 31),
    ("knorm", "score", lambda self, memory: memory.held**2),
    ("keydiff", "pointwise", True),
    ("r_kv", "balance", 0.2),
    ("r_kv", "threshold", 0.6),
    ("r_kv", "pool", 5),
    ("nacl", "percent", 33),
    ("nacl", "sinks", 3),
    ("pyramidkv", "beta", 10),
    ("ada_snapkv", "safeguard", None),
    ("criticalkv", "untouchable", lambda self, n: 0),
    ("criticalkv", "weigh", lambda self, sight: abs(sight.values[sight.head]).sum(-1)),
    ("defensivekv", "nucleus", 0.5),
    ("chunkkv", "shared", False),
    ("windowkv", "window", 31),
    ("finch", "window", 31),
    ("scissorhands", "score", lambda self, memory: memory.important),
    ("cake", "gamma", 100),
    ("cake", "spread", ""),
    ("corm", "recent", 20),
    ("cake", "prefer", lambda self, sights: 1.0),
]


@pytest.mark.parametrize(("policy", "name", "wrong"), MUTATIONS)
def test_mutation_is_caught(policy: str, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is sharp: a small mistake in the oracle disagrees with the library."""
    monkeypatch.setattr(POLICIES[policy], name, wrong)
    layers = Layers(policy, BUDGETS.get(policy, 48), (6, 2))
    with pytest.raises(AssertionError, match=r"step .* layer .* row .*: "):
        layers.converse([(150, 25), (60, 3)], [150, 110])
