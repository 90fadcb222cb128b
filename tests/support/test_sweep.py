"""The sweep itself: small configs, verdicts, what counts as worse, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig, Qwen2Config, Qwen3NextConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))

import scoreboard
import sweep
from shrink import WINDOW, covering, rule_for, tiny_config

GOOD = {
    "status": "ran",
    "layers": {"full": 2, "sliding": 1},
    "prefill": {"matched": 2, "declined": {"SLIDING_WINDOW": 1}},
    "decode": {"matched": 2, "declined": {"SLIDING_WINDOW": 1}},
    **{name: {"ok": True} for name in ("identity", "eviction", "bytes", "masks", "graphs")},
}
BAD = {"ok": False, "why": "AssertionError: step 3: logits differ"}
OUTSIDE = {"status": "no_cache", "why": "its forward takes no cache"}


def both(sdpa: dict[str, Any], eager: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"sdpa": sdpa, "eager": sdpa if eager is None else eager}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 64),
        ("vision_hidden_size", 64),
        ("num_attention_heads", 4),
        ("decoder_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("n_routed_experts", 4),
        ("kv_lora_rank", 16),
        ("image_token_id", 98),
        ("eos_token_id", 1),
        ("moe_intermediate_size", 96),
        ("rms_norm_eps", None),
        ("hidden_act", None),
    ],
)
def test_rules(name: str, value: int | None) -> None:
    assert rule_for(name) == value


def test_a_plain_config() -> None:
    config = tiny_config(LlamaConfig)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 4, 2)
    assert (config.head_dim, config.num_hidden_layers, config.vocab_size) == (16, 2, 99)
    assert tiny_config(LlamaConfig, {"num_hidden_layers": 3}).num_hidden_layers == 3


def test_every_kind_of_layer_is_there() -> None:
    """Full attention comes last and twice: it reads what the others wrote, and its own eviction."""
    assert tiny_config(Gemma2Config).layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert tiny_config(Gemma2Config).sliding_window == WINDOW
    assert tiny_config(Qwen3NextConfig).layer_types == ["linear_attention", "full_attention", "full_attention"]
    assert covering(["dense", "sparse", "sparse", "sparse"], 3) == ["dense", "sparse", "sparse"]


def test_second_shapes() -> None:
    """Heads the other way round, windows on."""
    one, other = tiny_config(LlamaConfig), tiny_config(LlamaConfig, other=True)
    assert (one.num_key_value_heads, other.num_key_value_heads) == (2, 4)
    windowed = tiny_config(Qwen2Config, other=True)
    assert windowed.sliding_window == WINDOW
    assert "sliding_attention" in windowed.layer_types


def test_a_wrong_second_shape_is_worse() -> None:
    good, bad = {**both(GOOD), "other shape": GOOD}, {**both(GOOD), "other shape": {**GOOD, "identity": BAD}}
    assert scoreboard.whole(good)
    assert not scoreboard.whole(bad)
    assert scoreboard.regressions({"llama": good}, {"llama": good}) == []
    assert "other shape" in scoreboard.regressions({"llama": both(GOOD)}, {"llama": bad})[0]


def test_sub_configs() -> None:
    class Inner(LlamaConfig):
        model_type = "llama"

    class Outer(LlamaConfig):
        sub_configs = {"text_config": Inner}  # noqa: RUF012

        def __post_init__(self, text_config: Any = None, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            self.text_config = Inner(**text_config) if isinstance(text_config, dict) else Inner()

    config = tiny_config(Outer, {"text_config": {"head_dim": 8}})
    assert (config.text_config.hidden_size, config.text_config.head_dim) == (64, 8)


def test_verdicts() -> None:
    assert scoreboard.passes(GOOD)
    assert not scoreboard.passes({**GOOD, "eviction": BAD})
    assert not scoreboard.passes({**GOOD, "eviction": {"ok": None, "why": "nothing is matched"}})
    declined = {**GOOD, "decode": {"matched": 1, "declined": {"UNSUPPORTED_ATTENTION": 1}}}
    assert not scoreboard.matched(declined)
    assert scoreboard.sites(declined) == "2 / 1 (SLIDING_WINDOW); decode 1 / 1 (UNSUPPORTED_ATTENTION)"
    assert scoreboard.whole(both({"status": "no_sdpa"}, GOOD))
    assert not scoreboard.whole(both({**GOOD, "identity": BAD}, GOOD))
    assert not scoreboard.in_scope(both(OUTSIDE))


def test_worse_is_named() -> None:
    before = {"llama": both(GOOD), "gpt2": both(GOOD), "bloom": both({**GOOD, "eviction": BAD})}
    assert scoreboard.regressions(before, before) == []
    now = {"llama": both(GOOD, {**GOOD, "identity": BAD}), "gpt2": both(OUTSIDE), "bloom": both(GOOD)}
    worse = scoreboard.regressions(before, now)
    assert [line.split(";")[0] for line in worse if "llama" in line] == ["  llama eager: identity"]
    assert sum("gpt2" in line for line in worse) == 2
    assert not any("bloom" in line for line in worse)
    assert scoreboard.regressions({**before, "gone": both(GOOD)}, before) == []


def test_the_documents() -> None:
    wrong = both({"status": "no_sdpa"}, {**GOOD, "identity": BAD})
    results = {
        "llama": both(GOOD),
        "git": both(GOOD, {**GOOD, "padded": False}),
        "gpt_oss": wrong,
        "rwkv": both(OUTSIDE),
    }
    files = scoreboard.document(results, command="make support")
    data, text = json.loads(files["support.json"]), files["support.md"]
    assert data["summary"] == {
        "families": 4, "in_scope": 3, "matched": 3, "identity": 2, "eviction": 3, "bytes": 3,
        "masks": 3, "graphs": 3, "all": 2,
    }  # fmt: skip
    assert scoreboard.regressions(data["families"], results) == []
    assert "| llama | 2 / 1 (SLIDING_WINDOW) | 2 / 1 (SLIDING_WINDOW) | ok ok | ok ok | ok ok |  |  |" in text
    assert "| gpt_oss | no sdpa | 2 / 1 (SLIDING_WINDOW) | **no** | ok | ok |  | AssertionError: step 3: logits" in text
    assert "| ok ok |  | tried without padding: the model itself does not ignore it |" in text
    assert "| rwkv | no cache: its forward takes no cache |" in text
    assert "every full-attention site matched: 3 (100 %)" in text
    assert "llama; sdpa: 2 / 1 (SLIDING_WINDOW) sites, identity ok" in scoreboard.line("llama", results["llama"])


def test_graphs_are_counted_beside_what_was_known():
    quick = {**GOOD, "graphs": {"skipped": True}}
    now = {"status": "ran", "graphs": BAD, "eviction": {"skipped": True}, "identity": {"ok": True, "gap": 0.0}}
    merged = sweep.with_more(both(quick), {"sdpa": now, "eager": {"status": "not tried"}})
    assert merged["sdpa"] == {**GOOD, "graphs": BAD, "identity": {"ok": True, "gap": 0.0}}
    assert merged["eager"] == quick
