"""What single families need beyond the general shrinking, and why some are out of scope.

Values go to the config as they are, a dict to the sub-config of that name. `__default__`: needed before the default
config can even be made. `__part__`: the sub-config that the causal LM is built from.
"""

from __future__ import annotations

from typing import Any

BIG_BIRD = {"attention_type": "original_full"}  # block-sparse attention has no cache
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 256,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
DOTS3 = {
    "num_key_value_heads": 4,
    "index_topk": 256,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_hidden_layers": 3}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 2], "num_hidden_layers": 3},
    "big_bird": BIG_BIRD,
    "bigbird_pegasus": BIG_BIRD,
    "blt": {"encoder_hash_byte_group_vocab": 99, "num_hidden_layers": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "cpmant": {"prompt_length": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": DOTS3, "audio_config": {"adapter_input_size": 64}},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None},  # as in most checkpoints; with a window no layer keeps all tokens
    "musicgen": {"__part__": "decoder", "decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"__part__": "decoder", "decoder": {"num_codebooks": 1}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}

WHOLE_INPUT = ("cpmant",)
"""Families whose forward wants all tokens at each call, and leaves out the cached ones itself."""

TWO_CACHES = ("blt",)
"""Families that are no encoder-decoders by their config and yet make an EncoderDecoderCache of what they are given."""

ONE_HEAD = ("diffllama",)
"""Families whose query heads read the keys of one KV head and the values of others: their heads share one choice."""

ASSISTANT = "a draft head: reads the keys of its target model, has no cache of its own"
OUT_OF_SCOPE: dict[str, str] = {
    "gemma3n": "not built: its vision tower needs timm; the language model is gemma3n_text",
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": ASSISTANT,
}
"""Readable reasons for families that the sweep finds out of scope."""
