"""Small configs: every size of a transformers config made tiny by its name, in sub-configs and per-layer lists too."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 99
SPECIAL = 98  # placeholder tokens of images and the like: never in a prompt
CONTEXT = 512
WINDOW = 24

RULES: list[tuple[str, int]] = [
    (r"pad_token_id", 0),
    (r"(bos|eos|forced_eos|forced_bos|sep|decoder_start)_token_id", 1),
    (r".*_token_(id|index)|(unk|mask)_index", SPECIAL),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"(\w+_)?vocab_size(_per_layer_input)?|vocab_offset", VOCABULARY),
    (r"hidden_size_per_layer_input|cross_attention_hidden_size", 8),
    (r"router_hidden_size|downsample_hidden_size|linear_head_dim|laurel_rank", 16),
    (r"(\w+_)?hidden_size|d_model|n_embd|(word_)?embed(_proj)?_dim|embedding_dim|emb_dim", 64),
    (r"((input|output)_)?embedding_size|hidden_size_global|lru_width|input_size", 64),
    (r"(vision_)?output_dim|adapter_(in|out)_dim", 64),
    (r"(\w+_)?(intermediate|feed_forward)_size(_mlp)?|(\w+_)?ffn_dim|dim_ff|dff|d_ff|d_inner|ffn_hidden_size", 96),
    (r"expert_ffn_hidden_size|mlp_dim", 96),
    (r"num_lstm_layers|num_global_layers", 1),
    (r"num_hidden_layers|(n|num|decoder|num_decoder|encoder|num_encoder)_layers?|num_blocks|depth", 2),
    (r"conf_num_hidden_layers", 2),
    (r"num_attention_heads|(decoder|encoder|num_decoder|num_encoder)?_?attention_heads|n_heads?|num_heads", 4),
    (r"swa_num_attention_heads|conf_num_attention_heads|index_n_heads|o_groups", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|num_global_key_value_heads", 2),
    (r"head_dim|swa_head_dim|global_head_dim|dim_head|d_head|d_kv|kv_channels|attention_head_(dim|size)", 16),
    (r"qk_(rope|nope)_head_dim|v_head_dim|swa_v_head_dim|index_head_dim|linear_(key|value)_head_dim", 16),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r"(q|kv|o)_lora_rank|gated_norm_rank|adapter_rank|d_rel|hc_lowrank|ple_embed_dim", 16),
    (r"(num|n_routed|num_local|moe_num|n_shared_routed)_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|decoder_sparse_step|moe_layer_start_index|max_window_layers", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_(seq|sequence)_len(gth)?|model_max_length", CONTEXT),
    (
        r"max_target_positions|context_length|original_max_position_embeddings|max_source_positions|num_position_embeddings",
        CONTEXT,
    ),
    (r"sliding_window(_size)?|window_size|local_attention|attention_window_size|local_attention_window_len", WINDOW),
    (r"attention_chunk_size", WINDOW),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_dt_rank|time_step_rank|mamba_d_head|mamba_head_?dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_value_heads|linear_num_heads", 8),
    (r"linear_num_key_heads", 4),
    (r"mamba_n_?groups|n_groups", 1),
    (r"chunk_size|mamba_chunk_size", 32),
    (r"image_size|crop_size", 32),
    (r"query_pre_attn_scalar", 16),
    (r"num_nextn_predict_layers", 0),
]


ALSO_IF_NONE = ("pad_token_id", "head_dim", "num_key_value_heads")


def rule_for(name: str) -> int | None:
    """The tiny value for an attribute of this name."""
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)


def layer_count(config: Any) -> int:
    """Layers of an unshrunk config; 0 where no attribute says."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    return next((int(getattr(config, n)) for n in names if isinstance(getattr(config, n, None), int)), 0)


def covering(values: list[Any], length: int) -> list[Any]:
    """A list of `length` that has each distinct value once, in order of appearance, the last one repeated; full
    attention comes last, so that it reads what all other kinds wrote."""
    distinct = list(dict.fromkeys(str(v) for v in values))
    kinds = [next(v for v in values if str(v) == d) for d in distinct]
    kinds.sort(key=lambda kind: kind in ("full_attention", "attention"))
    return (kinds + [kinds[-1]] * length)[:length]


def layers_needed(config: Any) -> int:
    """Two layers, or one more than there are kinds of layers, at most four."""
    kinds = set(map(str, getattr(config, "layer_types", None) or []))
    return 2 if len(kinds) < 2 else min(len(kinds) + 1, 4)


def per_layer(config: Any, length: int) -> dict[str, list[Any]]:
    """The lists of a config that say something of each layer, cut down to `length` layers."""
    before, short = layer_count(config), {}
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before and before > 2:
            short[name] = covering(value, length)
    return short


def numbers(config: Any) -> dict[str, Any]:
    """Tiny values for the plain attributes of a config that a rule knows and that are in use."""
    tiny = {}
    for name, value in vars(config).items():
        counted = isinstance(value, int) and not isinstance(value, bool)
        listed = name == "eos_token_id" and value is not None
        small = rule_for(name)
        if small is not None and (counted or listed or (value is None and name in ALSO_IF_NONE)):
            tiny[name] = small
    return tiny


def tiny_values(config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a tiny config of the same class. `overrides` come last; a dict among them goes to the
    sub-config of that name."""
    layers = overrides.get("num_hidden_layers") or layers_needed(config)
    values = numbers(config)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if name in values:
            values[name] = layers
    if "kv_lora_rank" in vars(config) and "num_key_value_heads" in values:  # MLA: the latent is expanded to all heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= per_layer(config, layers)
    for name in getattr(config, "sub_configs", {}):
        below = getattr(config, name, None)
        if below is not None and hasattr(below, "to_dict"):
            values[name] = {"model_type": below.model_type, **tiny_values(below, overrides.get(name, {}))}
    if "initializer_range" in vars(config):
        values["initializer_range"] = 0.02
    return values | {k: v for k, v in overrides.items() if k not in getattr(config, "sub_configs", {})}


def tiny_config(config_class: Any, overrides: dict[str, Any] | None = None, other: bool = False) -> Any:
    """A tiny config of this class; `other`: in its second shape, None where it has only one."""
    overrides = overrides or {}
    wanted = overrides.get("__default__", {})
    rest = {k: v for k, v in overrides.items() if not k.startswith("__")}
    values = tiny_values(config_class(**wanted), rest)
    first = config_class(**values)
    if not other:
        return first
    changes = other_shape(first)
    kept = {k: v for k, v in values.items() if k != "layer_types" or "use_sliding_window" not in changes}
    return config_class(**(kept | changes)) if changes else None


def other_shape(config: Any) -> dict[str, Any]:
    """What differs in the second shape of a config: heads share keys and values where they did not, or the other way
    round; and windows, where it has them and they are off.
    """
    has, changes = vars(config), {}
    heads, kv_heads = has.get("num_attention_heads"), has.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and "kv_lora_rank" not in has:
        changes["num_key_value_heads"] = heads // 2 if kv_heads == heads else heads
    if has.get("use_sliding_window") is False:
        changes |= {"use_sliding_window": True, "sliding_window": WINDOW}
    elif "sliding_window" in has and has["sliding_window"] is None:
        changes["sliding_window"] = WINDOW
    return changes
